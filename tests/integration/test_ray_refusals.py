"""What a Ray cluster is refused for, or a machine without one, before anything is served there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from ray_head import free_ports, ray_head
from service import ROOT

import tandem


def test_an_unreachable_head_is_said_at_once() -> None:
    port = free_ports(1)[0]
    words = ("serve", "--ray", "--address", f"127.0.0.1:{port}")
    ran = subprocess.run(
        [sys.executable, "-m", "tandem.cli.main", *words], cwd=ROOT, capture_output=True, text=True, timeout=20
    )
    assert (ran.returncode, ran.stderr) == (
        1,
        f"tandem: the Ray head at 127.0.0.1:{port} cannot be reached: Connection refused\n",
    )


def test_without_ray_it_says_how_to_get_it() -> None:
    blocked = (
        "import sys; sys.modules['ray'] = None; sys.argv = ['tandem', 'down']; import tandem.cli.main as m; m.main()"
    )
    ran = subprocess.run([sys.executable, "-c", blocked], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert (ran.returncode, ran.stderr) == (
        2,
        "tandem: Ray is not installed here: in a checkout, `make cluster-node` "
        "or pip install -c constraints.txt -e '.[serve,ray]'\n",
    )


def test_a_node_without_tandem_is_named(tmp_path: Path) -> None:
    (tmp_path / "tandem").mkdir()
    (tmp_path / "tandem" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'tandem'\")\n")
    with ray_head(tmp_path, prefill=1, decode=1) as head:
        ran = head.tandem("serve", "--ray", "--wait", "60", cwd=tmp_path.parent)
        assert ran.returncode == 1
        assert re.search(r"cannot serve on node [0-9.]+: .*No module named 'tandem'\n$", ran.stderr), ran.stderr
        assert head.tandem("down").stdout == "nothing is running\n"


def test_a_node_with_another_tandem_is_named(tmp_path: Path) -> None:
    (tmp_path / "tandem").mkdir()
    (tmp_path / "tandem" / "__init__.py").write_text(f"__path__, __version__ = [{str(ROOT / 'tandem')!r}], '9.9'\n")
    for room in ("router", "prefill_worker", "decode_worker", "kv_transfer"):
        (tmp_path / room).symlink_to(ROOT / room)
    with ray_head(tmp_path, prefill=1, decode=1) as head:
        ran = head.tandem("serve", "--ray", "--wait", "60", cwd=tmp_path.parent)
        assert ran.returncode == 1
        here = f"tandem is 9.9 here and {tandem.__version__} where the service was started"
        assert re.search(f"cannot serve on node [0-9.]+: {re.escape(here)}", ran.stderr), ran.stderr
        assert head.tandem("down").stdout == "nothing is running\n"
