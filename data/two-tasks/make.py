"""Writes two small data sets for two adapters that are to be merged: python3 make.py FOLDER

diary   what somebody wants to note, and the line in a diary:  "Dinner with Anna on Friday at 7 pm." -> fri 19:00 dinner anna
basket  what somebody wants to buy, and the list:              "Three kilos of rice and a bag of salt." -> rice 3 kg; salt 1 bag

Each gets 400 rows to train on, 60 to validate and 100 to test, the same ones every time. No request of one file is in another.
Project's own work, under its licence.
"""

import json
import random
import sys
from pathlib import Path

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
EVENTS = ["lunch", "dinner", "breakfast", "tennis", "a walk", "a call", "a meeting", "choir", "chess", "coffee"]
PEOPLE = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jonas", "Mia", "Oscar"]
NOTES = [
    "{Event} with {who} on {day} at {time}.",
    "Please note {event} with {who} at {time} on {day}.",
    "On {day} I have {event} with {who} at {time}.",
    "Put {event} with {who} down for {day}, {time}.",
    "{who} and I have {event} on {day} at {time}.",
]
NUMBERS = {1: ["a", "one"], 2: ["two"], 3: ["three"], 4: ["four"], 5: ["five"], 6: ["six"], 8: ["eight"], 10: ["ten"]}
UNITS = {"kg": ("kilo", "kilos"), "bag": ("bag", "bags"), "bottle": ("bottle", "bottles"), "can": ("can", "cans"), "pack": ("pack", "packs")}
GOODS = {
    "kg": ["rice", "potatoes", "apples", "flour", "onions", "carrots"],
    "bag": ["salt", "sugar", "coffee", "nuts"],
    "bottle": ["milk", "oil", "juice", "vinegar"],
    "can": ["beans", "corn", "soup", "tuna"],
    "pack": ["butter", "tea", "pasta", "biscuits"],
}
WISHES = ["I need {items}.", "{Items}, please.", "We are out of things: {items}.", "Could you get {items}?", "Buy {items} on your way."]


def diary(rng):
    """One request and its line."""
    day, event, who = rng.choice(DAYS), rng.choice(EVENTS), rng.choice(PEOPLE)
    hour, minute = rng.randrange(7, 23), rng.choice([0, 0, 15, 30, 45])
    clock = f"{(hour - 1) % 12 + 1}{f':{minute:02}' if minute else ''} {'am' if hour < 12 else 'pm'}"
    time = rng.choice([clock, f"{hour}:{minute:02}"])
    text = rng.choice(NOTES).format(day=day, event=event, Event=event[0].upper() + event[1:], who=who, time=time)
    return text, f"{day[:3].lower()} {hour:02}:{minute:02} {event.split()[-1]} {who.lower()}"


def basket(rng):
    """One request and its list."""
    said, listed = [], []
    for unit in rng.sample(sorted(UNITS), rng.choice([1, 2, 2, 3])):
        count, good = rng.choice(sorted(NUMBERS)), rng.choice(GOODS[unit])
        said.append(f"{rng.choice(NUMBERS[count])} {UNITS[unit][count > 1]} of {good}")
        listed.append(f"{good} {count} {unit}")
    items = " and ".join([", ".join(said[:-1]), said[-1]]) if len(said) > 1 else said[0]
    return rng.choice(WISHES).format(items=items, Items=items[0].upper() + items[1:]), "; ".join(listed)


def main(folder):
    for name, make in (("diary", diary), ("basket", basket)):
        rng, rows = random.Random(7), {}
        while len(rows) < 560:
            request, answer = make(rng)
            rows.setdefault(request, answer)
        rows = [json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) for q, a in rows.items()]
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, part in (("train", rows[:400]), ("valid", rows[400:460]), ("test", rows[460:])):
            (folder / name / f"{split}.jsonl").write_text("\n".join(part) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
