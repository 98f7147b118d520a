"""A judge behind a real endpoint: what it is asked, what its replies are worth, and what results tell of it."""

import json

import pytest

from retention.tasks.benchmarks import BENCHMARKS, judge
from retention.tasks.benchmarks.judge import Judge
from retention.tasks.benchmarks.longmemeval import PROMPTS
from tests.tasks.fixtures import images, task_of, texts
from tests.tasks.judging import VERSION, judging
from tests.tasks.test_benchmarks_run import evaluated

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(judge.time, "sleep", lambda seconds: None)
    datasets.disable_progress_bars()


def answered(task, number, prediction):
    """A row of an evaluation."""
    example = task.example(0, "test", number)
    return {"example_id": example.id, "prediction": prediction, "score": 0.25}


def test_without_a_judge_scores_stay(tmp_path):
    task = task_of("longmemeval", texts.FIXTURES["longmemeval"][0], tmp_path)
    rows = [answered(task, 0, "Heron")]
    assert task.judged(rows) == rows
    assert task.provenance(0, "test", 1) == {"judge": None}


def test_what_is_asked_depends_on_the_question_and_the_reply_is_the_score(tmp_path):
    def rule(prompt):
        return " Yes, it is.\n" if "Reply: The boat is the Heron." in prompt else "no"

    with judging(rule) as endpoint:
        asker = Judge("judge-1", endpoint.url)
        task = task_of("longmemeval", texts.FIXTURES["longmemeval"][0], tmp_path, judge=asker)
        rows = [
            answered(task, i, said) for i, said in ((0, "The boat is the Heron. "), (1, "2"), (2, "It is {answer}."))
        ]
        judged = task.judged([*rows, rows[0]])
    assert [row["score"] for row in judged] == [1.0, 0.0, 0.0, 1.0]
    prompts = [body["messages"] for body in endpoint.asked]
    assert len(prompts) == 3  # the same is asked once
    assert prompts[0] == [{"role": "user", "content": PROMPTS["usual"].format(
        question="What is my boat called?", answer="Heron", reply="The boat is the Heron.")}]  # fmt: skip
    assert "Reference: 3\n" in prompts[1][0]["content"]
    assert "does not tell" not in prompts[1][0]["content"]
    assert "earlier conversations do not tell" in prompts[2][0]["content"]
    assert "Reply: It is {answer}.\n" in prompts[2][0]["content"]
    told = {key: endpoint.asked[0][key] for key in ("model", "temperature", "max_tokens", "path", "key")}
    assert told == {"model": "judge-1", "temperature": 0.0, "max_tokens": 10, "path": "/v1/chat/completions", "key": "Bearer none"}  # fmt: skip
    name = f"judge-1 (version {VERSION}, prompts {task.prompts_hash})"
    assert judged[0]["judge"] == {"name": name, "reply": "Yes, it is.", "score_by_rules": 0.25}
    assert "-judged/" in judged[0]["example_id"]
    assert len(task.prompts_hash) == 16


@pytest.mark.parametrize(("kind", "words"), [
    ("temporal-reasoning", "may be off by one"),
    ("knowledge-update", "true before as well"),
    ("single-session-preference", "what the user would like"),
    ("single-session-assistant", "whatever words"),
])  # fmt: skip
def test_every_type_of_question_has_its_rules(kind, words):
    task = BENCHMARKS["longmemeval"]()
    row = texts.memory("q", "Heron", kind)
    assert words in task.prompt(row, "x")
    assert words not in task.prompt(texts.memory("q_abs", "Heron", kind), "x")
    with pytest.raises(ValueError, match=r"expected a question_type among single-session-user, .*, got 'riddle'"):
        task.prompt(row | {"question_type": "riddle"}, "x")


CHOICES = {"choices": ["a red mill", "a lamp", "B"], "answer": "a lamp", "answer_type": "text", "precision": None}
WHOLE = {"choices": None, "answer": "12", "answer_type": "integer", "precision": None}
SHARE = {"choices": None, "answer": "1.50", "answer_type": "float", "precision": 1.0}


@pytest.mark.parametrize(("row", "reply", "score"), [
    (CHOICES, "a lamp", 1), (CHOICES, "(b)", 1), (CHOICES, "a lmap", 1), (CHOICES, "A", 0), (CHOICES, "", 0),
    (CHOICES | {"choices": ["a mill", "a lamp"]}, "(B)", 1), (CHOICES | {"answer": "B"}, "B", 1),
    (WHOLE, "12.7", 1), (WHOLE, "13", 0), (WHOLE, "twelve", 0), (WHOLE, "", 0),
    (SHARE, "1.52", 1), (SHARE, "1.6", 0),
    (WHOLE | {"answer": "[1, 2]", "answer_type": "list"}, "[1, 2]", 1),
    (WHOLE | {"answer": "[1, 2]", "answer_type": "list"}, "[2, 1]", 0),
])  # fmt: skip
def test_what_is_extracted_takes_the_form_of_the_reference(row, reply, score):
    assert BENCHMARKS["mathvista"]().verdict(row, reply) == score


def test_extraction_is_asked_with_the_options_and_in_the_form_of_the_answer(tmp_path):
    with judging(lambda prompt: "A" if "the letter of its option" in prompt else "none") as endpoint:
        task = task_of("mathvista", images.FIXTURES["mathvista"][0], tmp_path, judge=Judge("judge-1", endpoint.url))
        judged = task.judged([answered(task, 0, "I take the first."), answered(task, 1, "It is nothing.")])
    asked = [body["messages"][0]["content"] for body in endpoint.asked]
    row = task.rows[0]
    assert f"\nA. {row['choices'][0]}\n" in asked[0]
    assert [row["score"] for row in judged] == [float(row["choices"][0] == row["answer"]), 0.0]
    assert task.example(0, "test", 0).meta["comparable"] is True


@pytest.mark.parametrize(("failures", "asked"), [((500, 429), 3), ((401,), 1), ((503,) * 4, 4)])
def test_an_endpoint_is_tried_again_unless_it_refuses(failures, asked):
    with judging(lambda prompt: "yes", failures) as endpoint:
        if asked > len(failures):
            assert Judge("judge-1", endpoint.url).ask(f"{failures}", 10) == ("yes", VERSION)
        else:
            with pytest.raises(
                ValueError, match=rf"^the judge judge-1 at {endpoint.url} did not answer: .*{failures[0]}"
            ):
                Judge("judge-1", endpoint.url).ask(f"{failures}", 10)
    assert len(endpoint.asked) == asked


def test_nobody_at_the_address_is_said_in_one_sentence():
    with judging(lambda prompt: "yes") as endpoint:
        pass
    with pytest.raises(ValueError, match=r"did not answer: .+") as told:
        Judge("judge-1", endpoint.url).ask("Anybody?", 10)
    assert "\n" not in str(told.value)


def test_keys_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("KEY_OF_THE_TEST", "sesame")
    with judging(lambda prompt: "yes") as endpoint:
        Judge("judge-1", endpoint.url, "KEY_OF_THE_TEST").ask("Who is there?", 10)
    assert endpoint.asked[0]["key"] == "Bearer sesame"


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"model": "judge-1"}, "expected judge.base_url, the address of an endpoint, for a judge, got None"),
    ({"model": "judge-1", "base_url": "http://x", "key": "NO_SUCH_KEY"}, "variable of the name in judge.key, got 'NO_SUCH_KEY'"),
    ({"seconds": 0.0}, "judge.seconds above 0, got 0.0"),
])  # fmt: skip
def test_judges_without_meaning_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Judge(**settings)


def test_results_name_the_judge_and_its_prompts(tmp_path):
    with judging(lambda prompt: "yes" if "do not tell" in prompt else "no") as endpoint:
        more = (
            f"task.longmemeval.judge={{model: judge-1, base_url: '{endpoint.url}'}}",
            "policies=[random]",
            "batch_size=1",
        )
        rows, summary, _ = evaluated("longmemeval", None, tmp_path, more=more, most_new_tokens=2)
    assert {row["score"] for row in rows if row["groups"]["abstention"]} == {1.0}
    assert {row["score"] for row in rows if not row["groups"]["abstention"]} == {0.0}
    (name,) = {row["judge"]["name"] for row in rows}
    assert {(row["comparable"], row["judges"]) for row in summary["rows"]} == {(True, name)}
    assert f"judged by {name}" in (tmp_path / "run" / "table.md").read_text()
    manifest = json.loads(text := (tmp_path / "run" / "manifest.json").read_text())
    assert "127.0.0.1" not in text
    told = manifest["tasks"]["longmemeval"]["judge"]
    assert (told["model"], told["prompts"]) == ("judge-1", PROMPTS)
    assert told["prompts_hash"] in name
    types = {
        row["group"]: row["accuracy"] for row in summary["groups"] if (row["by"], row["policy"]) == ("type", "full")
    }
    assert types == {"single-session-user": 0.5, "multi-session": 0.0, "mean": 0.25}
