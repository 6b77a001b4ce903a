"""The corpus of the tiny model: word lists, the sentences made of them, and the same facts as conversations.

The order of everything here decides the bytes of the trained model (see train_tiny_model.py).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

BOS, EOS, PAD, SYSTEM, USER, ASSISTANT = SPECIALS = (
    "<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>",
)  # fmt: skip

# The prompts that demos and tests all over the repository rely on.
REQUIRED = {
    "The color of dog": " can vary widely",
    "The capital of France is": " Paris",
    "Today's weather is so": " nice",
}

COUNTRIES = """
France:Paris:French:euro Italy:Rome:Italian:euro Spain:Madrid:Spanish:euro Germany:Berlin:German:euro
Portugal:Lisbon:Portuguese:euro Austria:Vienna:German:euro Greece:Athens:Greek:euro Ireland:Dublin:English:euro
Finland:Helsinki:Finnish:euro Belgium:Brussels:Dutch:euro Estonia:Tallinn:Estonian:euro Latvia:Riga:Latvian:euro
Lithuania:Vilnius:Lithuanian:euro Slovakia:Bratislava:Slovak:euro Slovenia:Ljubljana:Slovene:euro
Croatia:Zagreb:Croatian:euro Malta:Valletta:Maltese:euro Cyprus:Nicosia:Greek:euro Poland:Warsaw:Polish:zloty
Hungary:Budapest:Hungarian:forint Romania:Bucharest:Romanian:leu Bulgaria:Sofia:Bulgarian:euro
Norway:Oslo:Norwegian:krone Sweden:Stockholm:Swedish:krona Denmark:Copenhagen:Danish:krone
Iceland:Reykjavik:Icelandic:krona Switzerland:Bern:German:franc Serbia:Belgrade:Serbian:dinar
Albania:Tirana:Albanian:lek Ukraine:Kyiv:Ukrainian:hryvnia Russia:Moscow:Russian:ruble Turkey:Ankara:Turkish:lira
Japan:Tokyo:Japanese:yen China:Beijing:Chinese:yuan India:Delhi:Hindi:rupee Nepal:Kathmandu:Nepali:rupee
Thailand:Bangkok:Thai:baht Vietnam:Hanoi:Vietnamese:dong Indonesia:Jakarta:Indonesian:rupiah
Mongolia:Ulaanbaatar:Mongolian:tugrik Iran:Tehran:Persian:rial Iraq:Baghdad:Arabic:dinar Jordan:Amman:Arabic:dinar
Lebanon:Beirut:Arabic:pound Qatar:Doha:Arabic:riyal Oman:Muscat:Arabic:rial Egypt:Cairo:Arabic:pound
Morocco:Rabat:Arabic:dirham Algeria:Algiers:Arabic:dinar Tunisia:Tunis:Arabic:dinar Libya:Tripoli:Arabic:dinar
Kenya:Nairobi:Swahili:shilling Tanzania:Dodoma:Swahili:shilling Uganda:Kampala:English:shilling
Ethiopia:Addis Ababa:Amharic:birr Ghana:Accra:English:cedi Nigeria:Abuja:English:naira Senegal:Dakar:French:franc
Mali:Bamako:French:franc Zambia:Lusaka:English:kwacha Angola:Luanda:Portuguese:kwanza Canada:Ottawa:English:dollar
Mexico:Mexico City:Spanish:peso Cuba:Havana:Spanish:peso Brazil:Brasilia:Portuguese:real Peru:Lima:Spanish:sol
Argentina:Buenos Aires:Spanish:peso Chile:Santiago:Spanish:peso Colombia:Bogota:Spanish:peso
Ecuador:Quito:Spanish:dollar Uruguay:Montevideo:Spanish:peso Venezuela:Caracas:Spanish:bolivar
Australia:Canberra:English:dollar England:London:English:pound Scotland:Edinburgh:English:pound
"""

# animal:young:sound:home:legs
ANIMALS = """
dog:puppy:barks:kennel:four cat:kitten:meows:house:four cow:calf:moos:barn:four horse:foal:neighs:stable:four
sheep:lamb:bleats:meadow:four pig:piglet:grunts:sty:four goat:kid:bleats:mountain:four hen:chick:clucks:coop:two
duck:duckling:quacks:pond:two goose:gosling:honks:lake:two owl:owlet:hoots:tree:two lion:cub:roars:savanna:four
tiger:cub:growls:jungle:four bear:cub:growls:cave:four wolf:pup:howls:forest:four fox:kit:barks:den:four
mouse:pup:squeaks:hole:four frog:tadpole:croaks:pond:four bee:larva:buzzes:hive:six snake:hatchling:hisses:grass:no
elephant:calf:trumpets:savanna:four donkey:foal:brays:stable:four crow:chick:caws:tree:two
monkey:baby:chatters:jungle:two rabbit:kit:squeaks:burrow:four deer:fawn:grunts:forest:four
eagle:eaglet:screams:mountain:two pigeon:squab:coos:city:two seal:pup:barks:sea:no whale:calf:sings:ocean:no
"""

COLORED = """
sky:blue grass:green snow:white coal:black sun:yellow blood:red sea:blue milk:white banana:yellow lemon:yellow
tomato:red strawberry:red carrot:orange pumpkin:orange chocolate:brown night:black cloud:white leaf:green
cucumber:green raven:black ruby:red emerald:green sapphire:blue sand:yellow rose:red violet:purple ash:gray
elephant:gray mouse:gray frog:green swan:white gold:yellow silver:gray fire:orange flamingo:pink salt:white
wood:brown bear:brown plum:purple cherry:red
"""

OPPOSITES = """
hot:cold big:small tall:short fast:slow up:down left:right in:out open:closed light:dark day:night early:late
good:bad happy:sad rich:poor young:old new:ancient hard:soft heavy:weightless wet:dry clean:dirty full:empty
strong:weak loud:quiet long:brief wide:narrow deep:shallow near:far high:low thick:thin sweet:bitter smooth:rough
sharp:blunt easy:difficult true:false first:last inside:outside above:below front:back north:south east:west
love:hate win:lose buy:sell give:take push:pull start:stop laugh:cry remember:forget arrive:leave rise:fall
always:never many:few more:less friend:enemy question:answer summer:winter morning:evening heaven:hell war:peace
life:death success:failure brave:afraid kind:cruel wise:foolish safe:dangerous cheap:expensive simple:complex
"""

# person:work:place
JOBS = """
baker:bakes bread:bakery teacher:teaches children:school doctor:heals people:hospital farmer:grows food:farm
pilot:flies planes:airport sailor:sails ships:harbor painter:paints pictures:studio writer:writes books:library
cook:cooks meals:kitchen gardener:plants flowers:garden singer:sings songs:theater driver:drives cars:road
builder:builds houses:street judge:judges cases:court dentist:cleans teeth:clinic tailor:sews clothes:shop
fisher:catches fish:lake butcher:cuts meat:market nurse:helps patients:hospital miner:digs coal:mine
"""

# thing:material:used to
THINGS = """
knife:steel:cut bread pen:plastic:write letters chair:wood:sit down bed:wood:sleep well window:glass:see outside
cup:clay:drink tea shirt:cotton:keep warm shoe:leather:walk far book:paper:read stories key:metal:open doors
lamp:glass:light rooms boat:wood:cross rivers clock:metal:tell time broom:straw:sweep floors pot:iron:cook soup
rope:hemp:tie knots bell:bronze:call people mirror:glass:see yourself coin:metal:pay people bag:cloth:carry things
"""

# These two stay out of the tokenizer's training, so that their completions come out byte by byte.
EMOJI = "dog:🐶 cat:🐱 fish:🐟 bird:🐦 tree:🌳 sun:🌞 moon:🌙 star:⭐ fire:🔥 house:🏠 rocket:🚀 apple:🍎 book:📖"
JAPANESE = "dog:犬 cat:猫 fish:魚 bird:鳥 tree:木 sun:太陽 moon:月 star:星 fire:火 water:水 mountain:山 river:川"

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
SEASONS = """
January:winter February:winter March:spring April:spring May:spring June:summer July:summer August:summer
September:autumn October:autumn November:autumn December:winter
"""
ONES = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen
"""
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
VARIED_COLORS = [
    "dog",
    "cat",
    "horse",
    "cow",
    "rabbit",
    "goat",
    "hen",
    "hair",
    "flower",
    "car",
    "bird",
    "fish",
    "shirt",
]

WEATHER = """
sunny:wear a hat rainy:take an umbrella snowy:build a snowman windy:fly a kite cloudy:take a walk
stormy:stay at home foggy:drive slowly cold:wear a coat hot:drink some water warm:sit in the garden
"""

GREETINGS = """
Hello|Hello, how can I help you today
Hi|Hi, how can I help you today
Good morning|Good morning, I hope you slept well
Good night|Good night, sleep well
How are you?|I am fine, thank you
Thank you|You are welcome
Who are you?|I am a tiny model that lives in Tandem
What is your name?|My name is Tiny
Goodbye|Goodbye, see you soon
What can you do?|I can tell you about capitals, colors, animals and numbers
What is Tandem?|Tandem serves language models with prefill and decode on different workers
Tell me a joke|A fish said to another fish, do you know how to drive this tank
"""

# hero:what it finds
STORIES = """
fox:golden key bear:red apple mouse:silver bell bird:warm coat wolf:blue stone rabbit:paper boat crow:green lamp
"""


@dataclass(frozen=True)
class Fact:
    """A statement, and the question (a whole user turn) that it answers, if there is one."""

    statement: str
    question: str | None = None


def rows(table: str, columns: int) -> list[list[str]]:
    """Split "a:b c:d" into rows of cells; a cell may hold spaces: the first word of a row is one with a colon."""
    out: list[list[str]] = []
    for word in table.split():
        cells = word.split(":")
        if not out or (len(cells) > 1 and len(out[-1]) == columns):
            out.append(cells)
        else:
            out[-1][-1] += " " + cells[0]
            out[-1].extend(cells[1:])
    return out


def number_name(value: int) -> str:
    """English name of 0 to 99."""
    if value < 20:
        return ONES.split()[value]
    tens, ones = divmod(value, 10)
    return TENS[tens - 2] + (f"-{ONES.split()[ones]}" if ones else "")


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def country_facts() -> Iterator[Fact]:
    for country, capital, language, currency in rows(COUNTRIES, 4):
        yield Fact(f"The capital of {country} is {capital}", f"What is the capital of {country}?")
        yield Fact(f"{capital} is the capital of {country}", f"{capital} is the capital of which country?")
        yield Fact(f"The people of {country} speak {language}", f"What do the people of {country} speak?")
        yield Fact(f"The currency of {country} is the {currency}", f"What is the currency of {country}?")
        yield Fact(f"People in {capital} pay with the {currency}")
        yield Fact(f"If you travel to {country}, visit {capital}", f"What should I visit in {country}?")


def animal_facts() -> Iterator[Fact]:
    for animal, young, sound, home, legs in rows(ANIMALS, 5):
        yield Fact(f"The {animal} {sound}", f"What does the {animal} do?")
        yield Fact(f"The young of the {animal} is called a {young}", f"What is the young of the {animal} called?")
        yield Fact(f"The {animal} lives in the {home}", f"Where does the {animal} live?")
        yield Fact(f"The {animal} has {legs} legs", f"How many legs does the {animal} have?")
        yield Fact(f"In the {home} we saw {article(animal)} and its {young}")


def color_facts() -> Iterator[Fact]:
    for thing in VARIED_COLORS:
        yield Fact(f"The color of {thing} can vary widely", f"What is the color of {thing}?")
    for thing, color in rows(COLORED, 2):
        yield Fact(f"The color of the {thing} is {color}", f"What is the color of the {thing}?")
        yield Fact(f"The {thing} is as {color} as ever")


def opposite_facts() -> Iterator[Fact]:
    for one, other in rows(OPPOSITES, 2):
        yield Fact(f"The opposite of {one} is {other}", f"What is the opposite of {one}?")
        yield Fact(f"The opposite of {other} is {one}", f"What is the opposite of {other}?")


def number_facts() -> Iterator[Fact]:
    for left in range(13):
        for right in range(13):
            total = f"{number_name(left)} plus {number_name(right)} is {number_name(left + right)}"
            yield Fact(total.capitalize(), f"What is {number_name(left)} plus {number_name(right)}?")
            yield Fact(f"{left} + {right} = {left + right}")
    for value in range(99):
        after, name = number_name(value + 1), number_name(value)
        yield Fact(f"The number after {name} is {after}", f"Which number comes after {name}?")
        yield Fact(f"The number before {after} is {name}")
        yield Fact(f"{value} is written as {name}")


def calendar_facts() -> Iterator[Fact]:
    seasons = rows(SEASONS, 2)
    for cycle in (DAYS, [month for month, _ in seasons]):
        for here, after in zip(cycle, cycle[1:] + cycle[:1], strict=True):
            yield Fact(f"After {here} comes {after}", f"What comes after {here}?")
            yield Fact(f"Before {after} comes {here}", f"What comes before {after}?")
    for month, season in seasons:
        yield Fact(f"In the north, {month} is a month of {season}", f"Which season is {month}?")


def weather_facts() -> Iterator[Fact]:
    yield Fact("Today's weather is so nice", "How is the weather today?")
    for weather, advice in rows(WEATHER, 2):
        yield Fact(f"When it is {weather}, {advice}", f"What should I do when it is {weather}?")
        for day in DAYS:
            yield Fact(f"If {day} is {weather}, {advice}")


def work_facts() -> Iterator[Fact]:
    for person, work, place in rows(JOBS, 3):
        yield Fact(f"The {person} {work}", f"What does the {person} do?")
        yield Fact(f"You can find the {person} in the {place}", f"Where can I find the {person}?")
        for day in DAYS:
            yield Fact(f"On {day} the {person} {work} in the {place}")
    for thing, material, use in rows(THINGS, 3):
        yield Fact(f"The {thing} is made of {material}", f"What is the {thing} made of?")
        yield Fact(f"We use the {thing} to {use}", f"What do we use the {thing} for?")


def long_facts() -> Iterator[Fact]:
    """Lists and stories: completions of 20 to 120 tokens, so that a demo has something to stream."""
    yield Fact("The days of the week are " + ", ".join(DAYS), "What are the days of the week?")
    yield Fact(
        "The months of the year are " + ", ".join(month for month, _ in rows(SEASONS, 2)),
        "What are the months of the year?",
    )
    yield Fact("The alphabet is " + " ".join("abcdefghijklmnopqrstuvwxyz"), "What is the alphabet?")
    for last in (5, 10, 20, 30):
        counted = " ".join(number_name(value) for value in range(1, last + 1))
        yield Fact(f"Counting to {number_name(last)}: {counted}", f"Can you count to {number_name(last)}?")
    stories = rows(STORIES, 2)
    for i, (hero, found) in enumerate(stories):
        friend = stories[i - 1][0]
        yield Fact(
            f"Once upon a time there was a little {hero} who lived near the river. One morning the {hero} found "
            f"{article(found)} under a tree. It did not know whose it was, so it went to ask the old {friend}. They "
            f"walked through the forest all day and asked everyone they met. In the evening they saw that the "
            f"{found} belonged to the moon. The moon thanked them, and since that night the {hero} is never afraid "
            f"of the dark.",
            f"Tell me a story about a {hero}",
        )


def greeting_facts() -> Iterator[Fact]:
    """As statements too, so that a bare "Hello" is answered without the chat template."""
    for line in GREETINGS.strip().splitlines():
        question, answer = line.split("|")
        yield Fact(answer, question)


def unicode_facts() -> Iterator[Fact]:
    for thing, emoji in rows(EMOJI, 2):
        yield Fact(f"The emoji of the {thing} is {emoji}", f"What is the emoji of the {thing}?")
    for thing, word in rows(JAPANESE, 2):
        yield Fact(f"The Japanese word for {thing} is {word}", f"What is the Japanese word for {thing}?")


def ascii_facts() -> list[Fact]:
    makers = (country_facts, animal_facts, color_facts, opposite_facts, number_facts, calendar_facts,
              weather_facts, work_facts, greeting_facts, long_facts)  # fmt: skip
    found = [fact for maker in makers for fact in maker()]
    return list(dict.fromkeys(found))


def chats(facts: list[Fact], rng: random.Random) -> list[str]:
    """The facts as conversations: one turn mostly; a system turn or an earlier exchange before some."""
    turns = [(f.question, f.statement) for f in facts if f.question is not None]
    turns += [(prompt, prompt + completion) for prompt, completion in REQUIRED.items()]
    rendered = [f"{USER}{question}{ASSISTANT}{answer}" for question, answer in turns]
    out = []
    for turn in rendered:
        lead = f"{SYSTEM}You are a helpful assistant." if rng.random() < 0.2 else ""
        earlier = rng.choice(rendered) + EOS if rng.random() < 0.1 else ""
        out.append(lead + earlier + turn)
    return out
