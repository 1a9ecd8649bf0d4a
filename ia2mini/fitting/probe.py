"""A linear probe on the base's hidden states: what is known without training. It is reported, never shipped."""

import torch
from torch import Tensor

UNSEEN = -87.0  # log-probability of a label of which no row was seen


def probe_scores(
    states: Tensor, gold: Tensor, folds: list[list[int]], labels: int
) -> Tensor | None:
    """Log-probabilities [n, labels] of rows with `states` [n, D], each fold's by a fit on the other folds' rows.

    L2-regularised logistic regression on standardised states; None without scikit-learn.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        return None
    scores = torch.full((len(states), labels), UNSEEN)
    for test in folds:
        others = sorted(set(range(len(states))) - set(test))
        scaled = StandardScaler().fit(states[others]).transform(states)
        seen = sorted({int(gold[i]) for i in others})
        if len(seen) < 2:
            continue
        fitted = LogisticRegression(C=0.1, max_iter=1000).fit(scaled[others], gold[others])
        found = torch.tensor(fitted.predict_log_proba(scaled[test])).float()
        scores[torch.tensor(test)[:, None], torch.tensor(seen)] = found
    return scores
