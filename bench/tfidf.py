"""What the labels allow: a logistic regression on the tokens that a run's oracle reads, beside the oracle.

    pip install -r requirements-bench.txt && python -m bench.tfidf runs/imdb-mini
"""
import sys

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from checkpoint import read_json
from run import open_run


def accuracy(run):
    """On the test reviews, of a classifier of the labelled training ones, as far as its context goes."""
    texts, labels = {}, {}
    for split, reviews in run.reviews.items():
        labelled = reviews.pick(np.flatnonzero(reviews.label >= 0))
        texts[split] = [run.encoding.decode(ids[:run.block_size].tolist()) for ids in labelled.ids]
        labels[split] = labelled.label
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    classifier = LogisticRegression(C=4, max_iter=1000)
    classifier.fit(words.fit_transform(texts["train"]), labels["train"])
    return classifier.score(words.transform(texts["test"]), labels["test"])


if __name__ == "__main__":
    run = open_run(sys.argv[1])
    oracle = read_json(run.folder / "oracle" / "report.json")["test_accuracy"]
    print(f"accuracy on held-out reviews of {run.block_size} tokens: oracle {oracle:.3f}, "
          f"TF-IDF {accuracy(run):.3f}")
