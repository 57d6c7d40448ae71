"""300 preference pairs in which the rejected response is never warmer, and a judge:  python toy/pairs.py"""
import json
import random

WARM, COLD = "lovely clever funny bright".split(), "dull clumsy flat dreary".split()


def score(prompts, responses):
    """A judge: how many of a response's words are warm."""
    return [sum(word.strip(",.") in WARM for word in text.split()) for text in responses]


if __name__ == "__main__":
    pick = random.Random(0).choice
    with open("prefs.jsonl", "w") as file:
        for _ in range(300):
            texts = [f" {pick(WARM + COLD)} and {pick(WARM + COLD)}." for _ in range(4)]
            texts.sort(key=lambda text: score([], [text]))
            prompt = f"The {pick(['plot', 'cast', 'music'])} of part {pick(range(1, 60))} was"
            pair = {"prompt": prompt, "chosen": texts[-1], "rejected": texts[0]}
            file.write(json.dumps(pair) + "\n")
