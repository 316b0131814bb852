"""Our own prompts for training draft modules: questions, word problems and code stubs, made from lists and from the
docstrings of installed packages. None is of a benchmark.

    python -m fullpipe_lab.studies.training_prompts --count 2000 > prompts.jsonl

A line is {"messages": [{"role": "user", "content": ...}]}, which `fullpipe train distill` answers.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

TOPICS = """the water cycle|photosynthesis|the French Revolution|compound interest|black holes|vaccines|
the stock market|home gardening|sleep|the Roman Empire|climate change|electric cars|solar panels|jazz|
chess openings|the human heart|volcanoes|inflation|public speaking|job interviews|time management|
baking bread|hiking in the mountains|the moon landing|the internet|encryption|machine learning|
neural networks|databases|recursion|sorting algorithms|operating systems|a lighthouse keeper|a talking cat|
a lost astronaut|a small bookshop|a rainy city|an old sailor|a robot that dreams|two friends who argue|
a village market|a broken clock|a long train journey|the first day of school|coffee|tea ceremonies|Japan|
Brazil|Iceland|Egypt|Kenya|New York|Paris|Rome|the Amazon rainforest|the Sahara|the ocean|whales|bees|
wolves|dinosaurs|genetics|DNA|atoms|gravity|relativity|quantum mechanics|probability|calculus|prime numbers|
geometry|statistics|democracy|human rights|the printing press|the industrial revolution|World War II|
the Silk Road|Shakespeare|poetry|impressionism|opera|film editing|photography|football|marathon running|
yoga|nutrition|vitamins|stress|friendship|negotiation|leadership|remote work|online courses|a budget|
renting a flat|recycling|public transport|bicycles|space telescopes|robots|drones|3D printing|video games|
board games|crossword puzzles|knitting|woodworking|painting"""

ASKS = """Explain {t} to a ten year old.|Write a short story about {t}.|What are the most important facts about {t}?|
List five tips about {t}.|Write an email to a colleague about {t}.|Compare {t} and {u}.|
Write a poem about {t}.|What are common misconceptions about {t}?|Give a short history of {t}.|
How does {t} relate to {u}?|Write a persuasive paragraph about {t}.|
Summarize what you know about {t} in three sentences.|
Pretend you are an expert in {t}. What would you teach first?|Describe {t} for a travel blog.|
What questions should I ask to learn more about {t}?|
Write a dialogue between a teacher and a student about {t}.|
Make a study plan for {t} with one step per day.|What are the advantages and disadvantages of {t}?|
Why does {t} matter today?|Rewrite this sentence in a formal tone: I really like {t}, it is so cool!|
Is {t} more important than {u}? Give reasons.|
Write a headline and a first paragraph of a news story about {t}.|
Name three books or films about {t} and say why they are worth it.|Draft a product description for {t}."""

NAMES = """Anna|Ben|Clara|David|Emma|Frank|Grace|Henry|Iris|Jack|Karen|Leo|Maya|Noah|Olga|Paul|Rita|Sam|Tina|Victor"""
THINGS = """apples|books|marbles|cookies|tickets|pencils|stamps|flowers|bottles|eggs|toys|cards"""

PROBLEMS = """{n} has {a} {x} and buys {b} more. Then {n} gives {c} to {m}. How many {x} does {n} have now?|
A box holds {c} {x}. {n} fills {b} boxes and has {a} {x} left. How many {x} were there at first?|
{n} earns ${a} per hour and works {c} hours a day for {b} days. How much money does {n} earn?|
{n} reads {c} pages a day. A book has {big} pages. After {b} days, how many pages are left?|
A ticket costs ${c}. {n} buys {b} tickets and pays with ${big}. How much change does {n} get?|
{n} drives {a} miles in {c} hours, and {m} drives {b} miles in the same time. How much faster is one than the other?|
There are {big} {x} in a shop. In the morning {a} are sold, in the afternoon twice as many. How many are left?|
{n} is {c} years older than {m}. In {b} years the sum of their ages will be {big}. How old is {n} now?|
{n} saves ${a} every week. How many weeks does it take to buy a bike for ${big} if {m} gives {n} ${b}?|
A recipe needs {c} {x} for {b} people. How many {x} are needed for {a} people?"""


def questions(random: random.Random) -> Iterator[str]:
    """Endless questions of the kinds that people ask."""
    topics, asks = _split(TOPICS), _split(ASKS)
    while True:
        topic, other = random.sample(topics, 2)
        yield random.choice(asks).format(t=topic, u=other)


def problems(random: random.Random) -> Iterator[str]:
    """Endless arithmetic word problems."""
    templates = _split(PROBLEMS)
    while True:
        name, other = random.sample(_split(NAMES), 2)
        yield random.choice(templates).format(
            n=name, m=other, x=random.choice(_split(THINGS)), a=random.randint(12, 60), b=random.randint(2, 12),
            c=random.randint(2, 11), big=random.randint(140, 400))


def stubs(random: random.Random) -> Iterator[str]:
    """Python functions of the standard library without their bodies, and requests to explain whole ones."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.shuffle(files)
    for file in files:
        try:
            source = file.read_text()
            functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
        except (SyntaxError, UnicodeDecodeError):
            continue
        random.shuffle(functions)
        for function in functions[:12]:
            code = ast.get_source_segment(source, function) or ""
            docstring = ast.get_docstring(function)
            if docstring and len(docstring) < 500:
                head = f"def {function.name}({ast.unparse(function.args)}):\n    \"\"\"{docstring}\"\"\"\n"
                yield f"Complete this Python function.\n```python\n{head}```"
            if 80 < len(code) < 700:
                yield random.choice(("Explain what this Python function does.", "Write a test for this function.",
                                     "Add comments to this code.")) + f"\n```python\n{code}\n```"


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split("|")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shuffler = random.Random(options.seed)
    kinds = [questions(shuffler), questions(shuffler), problems(shuffler), stubs(shuffler)]
    seen: set[str] = set()
    while len(seen) < options.count:
        prompt = next(kinds[shuffler.randrange(len(kinds))], None)
        if prompt is None or prompt in seen:
            continue
        seen.add(prompt)
        print(json.dumps({"messages": [{"role": "user", "content": prompt}]}))


if __name__ == "__main__":
    main()
