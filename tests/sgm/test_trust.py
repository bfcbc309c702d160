"""Trust in a match: calibrated on phrasings that training never shows, and not given to near misses."""

import numpy as np

from model.sgm.memory_entry import Entry, Match
from model.sgm.trust import judged_queries


def test_trust_is_calibrated_on_held_out_phrasings(router):
    judged = judged_queries((5, 30, 150), held_out=True, seed=11, queries=60)
    trust = np.array([p for each in judged for p in router.trust(each.query, each.matches)])
    right = np.array([a for each in judged for a in each.answers])
    accepted = trust >= 0.5
    assert right[accepted].mean() > 0.8 and accepted[right].mean() > 0.6
    bins = np.minimum((trust * 10).astype(int), 9)
    error = sum(abs(trust[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in set(bins))
    assert error < 0.04
    assert right.mean() < 0.15  # so that accepting nothing, or all, would not do


def test_trust_of_near_misses(router):
    def trust(query, *texts):
        matches = [Match(Entry(i, "fact", text, 1.0, 0.0, 0.0, 0, "user"), 5.0 - i) for i, text in enumerate(texts)]
        return router.trust(query, matches)

    assert router.trust("anything", []) == []
    right, other = trust("What is my dog's name?", "My dog's name is Rex.", "Anna's shoe size is 38.")
    assert right > 0.5 > other
    for text in ("My cat's name is Rex.", "My shoe size is 41.", "Rex is Anna's best friend."):
        assert trust("What is my dog's name?", text)[0] < 0.5
    mine, hers = trust("What is my dog's name?", "My dog's name is Rex.", "Anna's dog's name is Max.")
    assert mine > 0.9 and hers < 0.5
    assert trust("Mehmet'in doğum günü ne zaman?", "Ayşe'nin doğum günü 3 Mayıs.")[0] < 0.5
    right, other = trust("Ayşe'nin arabası ne?", "Ayşe'nin arabası mavi.", "Mehmet'in arabası siyah.")
    assert right > 0.5 > other


def test_ranking_by_trust_beats_bm25_alone(router):
    judged = [j for j in judged_queries((300,), held_out=True, seed=5, queries=200) if any(j.answers)]
    alone = np.mean([j.answers[0] for j in judged])
    ranked = np.mean([j.answers[int(np.argmax(router.trust(j.query, j.matches)))] for j in judged])
    assert ranked > 0.9 and ranked >= alone
