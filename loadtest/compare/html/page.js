"use strict";
// Draws every figure into the element of its id. Colours in figures are names of the page's CSS: light, dark, and
// drawn again when the reader changes that.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const touch = matchMedia("(pointer: coarse)").matches;
  // Dragging zooms and a double click goes back; a bar of buttons would cover what is at the top right.
  const config = { responsive: true, displayModeBar: false };

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function coloured(value) {
    if (typeof value === "string") {
      const name = /^var\((--[\w-]+)\)$/.exec(value);
      return name ? css(name[1]) : value;
    }
    if (Array.isArray(value)) return value.map(coloured);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, coloured(each)]));
    }
    return value;
  }

  function axis(own) {
    return {
      gridcolor: css("--grid"),
      linecolor: css("--grid"),
      zerolinecolor: css("--grid"),
      ...own,
      title: { standoff: 8, ...own.title },
    };
  }

  function layout(own) {
    return {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: css("--font"), size: 12, color: css("--text") },
      hoverlabel: { bgcolor: css("--raised"), bordercolor: css("--line"), font: { color: css("--text") } },
      showlegend: false,
      // A finger that scrolls the page must not zoom a plot.
      dragmode: touch ? false : "zoom",
      ...own,
      xaxis: axis(own.xaxis),
      yaxis: axis(own.yaxis),
    };
  }

  const draw = () =>
    Promise.all(figures.map(({ id, data, layout: own }) => Plotly.react(id, coloured(data), coloured(layout(own)), config)));

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw().then(() => document.documentElement.classList.add("drawn"));
})();
