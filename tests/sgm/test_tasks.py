"""Tasks are distinct and fit their rows, and what counts is exactly the answers' bytes."""

import pytest
import torch

from model.sgm.tasks import CATEGORIES, KINDS, ORDINARY, Task, category_tasks, micro_tasks, ordinary, stack


def test_a_hundred_distinct_tasks_twenty_of_each_kind_by_turns():
    tasks = micro_tasks()
    assert len(tasks) == 100
    assert len({prompt for task in tasks for prompt, _ in task.pairs}) == 100
    assert len({task.name for task in tasks}) == 100
    assert all(task.kind == KINDS[i % 5] and task.name.startswith(task.kind) for i, task in enumerate(tasks))
    assert all(sum(task.kind == kind for task in tasks) == 20 for kind in KINDS)
    assert all(len(task.pairs) == 1 and all(part for pair in task.pairs for part in pair) for task in tasks)
    assert {prompt for task in tasks for prompt, _ in task.pairs if prompt.endswith(" ")} == {
        prompt for task in tasks for prompt, _ in task.pairs
    }
    assert micro_tasks(7) == tasks[:7]


def test_no_prompt_begins_another():
    """Bytes read from the left: a prompt inside another would ask for two answers."""
    prompts = [prompt.encode() for task in micro_tasks() for prompt, _ in task.pairs]
    assert not [(a, b) for a in prompts for b in prompts if a is not b and b.startswith(a)]


def test_all_fit_a_row_of_48_bytes():
    x, counts = stack(micro_tasks(), 48)
    assert x.shape == counts.shape == (100, 48)
    assert counts.sum(1).min() >= 2 and not counts[:, 0].any()


def test_categories():
    tasks = category_tasks()
    assert tuple(tasks) == CATEGORIES and all(task.kind == name for name, task in tasks.items())
    for task in tasks.values():
        prompts = [prompt for prompt, _ in task.pairs]
        assert len(prompts) >= 3 and len(set(prompts)) == len(prompts) and all(answer for _, answer in task.pairs)


TASKS = [
    Task("a", "fact", (("başkent: ", "İzmir 🙂"), ("", "all of it"))),
    Task("b", "style", (("no answer", ""), ("ş", "ğ"))),
]


@pytest.mark.parametrize("length", [None, 21, 64])
def test_what_counts_is_the_answers_bytes(length):
    x, counts = stack(TASKS, length)
    pairs = [pair for task in TASKS for pair in task.pairs]
    longest = max(len((prompt + answer).encode()) for prompt, answer in pairs)
    assert x.shape == counts.shape == (4, length or longest) and x.dtype == torch.uint8 and counts.dtype == torch.bool
    for row, mask, (prompt, answer) in zip(x, counts, pairs):
        written = bytes(row.tolist())
        assert written == (prompt + answer).encode() + bytes(x.shape[1] - len((prompt + answer).encode()))
        assert bytes(row[mask].tolist()).decode() == answer
        assert bytes(row[: len(prompt.encode())].tolist()).decode() == prompt
        places = mask.nonzero().flatten().tolist()
        assert places == list(range(len(prompt.encode()), len((prompt + answer).encode())))


def test_a_task_alone():
    x, counts = TASKS[0].batch(30)
    both, both_count = stack(TASKS[:1], 30)
    assert torch.equal(x, both) and torch.equal(counts, both_count) and x.shape == (2, 30)


def test_turkish_answers_are_there():
    """Two bytes a letter: a mask by letters would cut them."""
    task = next(task for task in micro_tasks() if task.pairs[0][1] == "İzmir")
    x, counts = task.batch()
    assert counts.sum() == 6 and bytes(x[counts].tolist()) == "İzmir".encode()


def test_bad_input():
    with pytest.raises(ValueError, match=r"length=8: accepted is at least 21, the longest row"):
        stack(TASKS, 8)
    with pytest.raises(ValueError, match=r"tasks=\[\]: accepted is at least one"):
        stack([])
    with pytest.raises(ValueError, match="accepted is at least one, with a pair"):
        Task("empty", "fact", ()).batch()
    for count in (0, -1, 101):
        with pytest.raises(ValueError, match=f"count={count}: accepted is from 1 to 100"):
            micro_tasks(count)
    for length in (0, -3, 1_000):
        with pytest.raises(ValueError, match=f"length={length}: accepted is from 1 to "):
            ordinary(length)


@pytest.mark.parametrize("length", [1, 20, 48])
def test_ordinary_text_in_rows(length):
    x = ordinary(length)
    texts = [text.encode() for text in ORDINARY]
    assert x.dtype == torch.uint8 and len(x) == sum(len(text) // length for text in texts)
    rows = [bytes(row.tolist()) for row in x]
    assert all(any(row in text for text in texts) for row in rows)
    for text in texts:
        whole = b"".join(row for row in rows if row in text)
        assert length == 1 or text.startswith(whole[: len(text) // length * length])
    assert len(ordinary(max(len(text) for text in texts))) >= 1


def test_ordinary_text_is_of_no_task():
    pairs = [pair for task in [*micro_tasks(), *category_tasks().values()] for pair in task.pairs]
    assert not any(prompt + answer in text for prompt, answer in pairs for text in ORDINARY)
    assert not any(prompt in text for task in micro_tasks() for prompt, _ in task.pairs for text in ORDINARY)
