"""Published data sets on rows of our own in their schemas: columns, prompts, gold answers, turns, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

from retention.data.example import Sampling, TextRef
from retention.tasks.benchmarks import BENCHMARKS
from retention.tasks.scorers import SCORERS
from tests.tasks.fixtures import features_of, images, task_of, texts

datasets = pytest.importorskip("datasets")
FIXTURES = {**texts.FIXTURES, **images.FIXTURES}
EVERY = [
    pytest.param(name, number, id=f"{name}-{number}")
    for name, given in FIXTURES.items()
    for number in range(len(given))
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def read(name, place, number=0, **changes):
    return task_of(name, FIXTURES[name][number], place / "data", **changes)


def right(turn):
    """What a model that is right says."""
    if turn.scorer == "abstention":
        return "You have not mentioned that."
    if turn.scorer == "vqa_soft":
        return max(turn.answer, key=turn.answer.count)
    return turn.reference


def test_every_benchmark_has_a_fixture():
    assert set(FIXTURES) == set(BENCHMARKS)
    assert all(BENCHMARKS[name].name == name for name in BENCHMARKS)


@pytest.mark.parametrize(("name", "number"), EVERY)
def test_gold_answers_score_1_and_others_0(name, number, tmp_path):
    task = read(name, tmp_path, number)
    ids = set()
    for index in range(task.available("test", 10**6)):
        example = task.example(0, "test", index)
        ids.add(example.id)
        assert example.id.startswith(f"{name}/")
        assert example.n_turns >= 1
        for turn in example.turns:
            assert SCORERS[turn.scorer](right(turn), turn.answer, turn.choices) >= 0.9, turn
            assert SCORERS[turn.scorer]("Zq?!", turn.answer, turn.choices) == 0.0, turn
            assert turn.max_new_tokens >= 1
        assert {"n_images", "chance", "comparable"} <= set(example.meta)
        json.dumps(example.meta)
    assert len(ids) == task.available("test", 10**6) == len(FIXTURES[name][number].rows)


@pytest.mark.parametrize(("name", "number"), EVERY)
def test_columns_are_those_the_reader_asks_for(name, number, tmp_path):
    fixture, schema = FIXTURES[name][number], BENCHMARKS[name].schema
    if fixture.features is not None:
        stored = datasets.load_dataset("parquet", data_files=read(name, tmp_path, number).path, split="train")
        assert set(stored.features) == set(features_of(fixture.features)) == set(fixture.features)
    present = fixture.features or fixture.rows[0]
    wanted = [column for column, kind in schema.items() if not kind.endswith("?")]
    assert all(any(known in present for known in column.split("|")) for column in wanted)


@pytest.mark.parametrize("name", FIXTURES)
def test_a_missing_or_retyped_column_is_named(name, tmp_path):
    task = read(name, tmp_path)
    whole = task.rows[0]
    for names in [column for column, kind in task.schema.items() if not kind.endswith("?")]:
        column = next(known for known in names.split("|") if known in whole)
        without = {known: value for known, value in whole.items() if known != column}
        for row, found in ((without, "found "), ({**whole, column: None}, "found null")):
            broken = replace(task)
            broken.__dict__["rows"] = [row]
            with pytest.raises(ValueError, match=rf"{name}: expected .*'{column}'.*{found}"):
                broken.example(0, "test", 0)


@pytest.mark.parametrize(("name", "words"), [
    ("longbench", [("Story:\nMara", "green glass")]),
    ("longbench_v2", [("<text>\nMara", "</text>")]),
    ("gsm8k", [("Two mills", "each?")]),
    ("longmemeval", [("Conversation of 2023/05/02", "assistant: A fine name.")]),
])  # fmt: skip
def test_the_document_comes_before_and_the_question_behind(name, words, tmp_path):
    example = read(name, tmp_path).example(0, "test", 0)
    context = "".join(part.payload for part in example.segments)
    for start, end in words:
        assert 0 <= context.index(start) <= context.index(end)
    assert example.turns[0].question not in context


def test_choices_are_lettered_and_read_as_each_set_gives_them(tmp_path):
    v2 = read("longbench_v2", tmp_path).example(0, "test", 0).turns[0]
    assert v2.question.splitlines()[1:5] == ["A. red clay", "B. green glass", "C. tin", "D. glass"]
    assert [v2.answer, *v2.choices] == ["B", "red clay", "green glass", "tin", "glass"]
    mmmu = read("mmmu", tmp_path).example(0, "test", 0)
    assert mmmu.turns[0].choices == ["3.5", "Both, as in image 2"]
    assert mmmu.turns[0].question.startswith("Compare image 1 with image 2.\nA. 3.5\n")
    labels = [part.payload for part in mmmu.segments if part.kind == "text"]
    assert labels == ["Image 1: ", "\n", "Image 2: ", "\n"]
    opened = replace(read("mmmu", tmp_path)).example(0, "test", 1).turns[0]
    assert (opened.answer, opened.scorer) == (["3.50", "7/2"], "short_answer")
    long = read("longvideobench", tmp_path / "v").example(0, "test", 0)
    assert (long.turns[0].choices, long.turns[0].answer) == (["Hello", "It snows", "Nothing"], "B")
    assert long.meta["chance"] == pytest.approx(1 / 3)
    debug = read("infinitebench", tmp_path / "i", 4).example(0, "test", 0).turns[0]
    assert (debug.answer, debug.choices) == ("C", ["e", "f", "g", "h"])
    vision = read("mmmu_pro", tmp_path / "p", 1).example(0, "test", 0)
    assert (len(vision.images), vision.turns[0].answer, vision.meta["chance"]) == (1, "J", 0.1)
    assert "A. a" not in vision.turns[0].question


def test_images_stand_in_their_places_and_the_question_behind_the_last(tmp_path):
    mile = read("milebench", tmp_path).example(0, "test", 0)
    assert [s.payload if s.kind == "text" else "IMAGE" for s in mile.segments] == [
        "Look closely.\n", "First ", "IMAGE", " then ", "IMAGE", " and ", "IMAGE",
    ]  # fmt: skip
    assert mile.turns[0].question.strip().startswith("Which came last?\nA. a mill\nB. a lamp")
    assert mile.meta["groups"] == {"set": "ActionSequence", "images": "few"}
    niah = read("mm_niah", tmp_path / "n").example(0, "test", 0)
    assert [s.kind for s in niah.segments] == ["text", "image", "text", "image", "text"]
    assert niah.turns[0].evidence == [TextRef(2, 0, 28)]
    assert niah.segments[2].payload == "The heron nests by the mill. Rain fell."
    assert niah.meta["groups"] == {
        "task": "retrieval-text",
        "length": "2k",
        "depth": "40%",
        "length x depth": "2k x 40%",
    }
    pictured = read("mm_niah", tmp_path / "o", 2).example(0, "test", 0)
    assert [s.kind for s in pictured.later] == ["text", "image", "text", "image"]
    assert pictured.turns[0].answer == "A"
    assert pictured.turns[0].evidence == []


def test_photographs_come_in_an_order_fixed_by_the_seed(tmp_path):
    task = read("visual_haystacks", tmp_path)
    orders = [[s.payload.tobytes() for s in task.example(seed, "test", 0).segments] for seed in (0, 0, 1, 2, 3)]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) > 1
    assert len({tuple(sorted(order)) for order in orders}) == 1
    example = task.example(0, "test", 0)
    positive = read("mm_niah", tmp_path / "n").example(0, "test", 0).images[0]  # a.png in both
    assert example.meta["depth"] == [pytest.approx([np.array_equal(x, positive) for x in example.images].index(True) / 3, abs=1e-3)]  # fmt: skip
    assert "<image>" not in example.turns[0].question


def test_videos_are_frames_evenly_spaced_and_one_video_is_one_cluster(tmp_path):
    task = read("video_mme", tmp_path, frames=3)
    examples = [task.example(0, "test", i) for i in range(4)]
    assert [e.meta["cluster"] for e in examples] == ["abc", "abc", "xyz", "xyz"]
    every = read("video_mme", tmp_path / "all", frames=8).example(0, "test", 0).images
    assert [int(np.argmin([np.abs(x.astype(int) - y).sum() for y in every])) for x in examples[0].images] == [0, 4, 7]
    assert examples[0].turns[0].choices == ["Rain.", "Snow.", "A leaf.", "Night."]
    told = replace(task, subtitles=str(tmp_path / "data" / "subtitles")).example(0, "test", 0)
    assert told.segments[-1].payload == "Subtitles: It snows. Still.\n"
    assert told.id == "video_mme/3-frames-subtitles/test/0"
    with pytest.raises(ValueError, match=r"row 0: missing video: abc.mp4 in task.video_mme.folder = .*nowhere"):
        replace(task, folder=str(tmp_path / "nowhere")).example(0, "test", 0)


def test_subtitles_stand_before_the_frame_that_follows_them(tmp_path):
    example = read("longvideobench", tmp_path).example(0, "test", 0)
    told = [s.payload if s.kind == "text" else "F" for s in example.segments]
    assert told == ["F", "F", "It snows.\n", *["F"] * 5, "Still.\n", "F"]  # at 2.0 and 6.25 of 7 seconds
    silent = read("longvideobench", tmp_path / "s", subtitles=False).example(0, "test", 0)
    assert [s.kind for s in silent.segments] == ["image"] * 8


def test_several_questions_of_one_context(tmp_path):
    dialogue = read("scbench", tmp_path).example(0, "test", 0)
    assert (dialogue.n_turns, dialogue.query_position, dialogue.independent) == (3, "deferred_turn", False)
    assert dialogue.turns[1].answer == "value-001"
    alone = read("scbench", tmp_path / "a", 1).example(0, "test", 0)
    assert (alone.n_turns, alone.query_position, alone.independent) == (2, "after", True)
    assert [turn.answer for turn in alone.turns] == ["B", "A"]
    mixed = read("scbench", tmp_path / "m", 4).example(0, "test", 0)
    kinds = [(turn.scorer, turn.max_new_tokens) for turn in mixed.turns]
    assert kinds == [("function_match", 1024), ("contains_any", 80), ("function_match", 1024)]
    assert mixed.turns[0].choices == texts.FUNCTIONS
    assert len(read("scbench", tmp_path / "b").example(0, "test", 0, n_turns=1).turns) == 1


def test_without_a_judge_rows_say_that_they_are_not_comparable(tmp_path):
    memory = read("longmemeval", tmp_path)
    assert [memory.example(0, "test", i).meta["comparable"] for i in range(3)] == [False] * 3
    assert "no-judge-not-comparable" in memory.example(0, "test", 0).id
    marked, _, unknown = (memory.example(0, "test", i) for i in range(3))
    ref = marked.turns[0].evidence[0]
    assert marked.segments[ref.segment].payload[ref.start : ref.end] == "user: My boat is called Heron."
    assert (unknown.turns[0].scorer, unknown.turns[0].evidence) == ("abstention", [])
    assert read("mathvista", tmp_path / "v").example(0, "test", 0).meta["comparable"] is False
    assert read("docvqa", tmp_path / "d").example(0, "test", 0).meta["comparable"] is True


def test_problems_are_asked_several_times_with_seeds_of_their_own(tmp_path):
    task = read("aime", tmp_path, samples=3, temperature=0.6, top_p=0.95)
    assert task.available("test", 100) == 6
    drawn = [task.example(0, "test", i) for i in range(6)]
    assert [e.meta["cluster"] for e in drawn] == ["aime/train/test/0"] * 3 + ["aime/train/test/1"] * 3
    assert len({e.id for e in drawn}) == len({e.sampling.seed for e in drawn}) == 6
    assert drawn[0].sampling == Sampling(0.6, 0.95, drawn[0].sampling.seed)
    assert task.example(0, "test", 4).sampling == drawn[4].sampling != task.example(1, "test", 4).sampling
    assert all(e.evicts_answers for e in drawn)
    assert (drawn[0].segments[0].payload, drawn[0].turns[0].answer) == ("What is 3 + 30?\n\n", "33")
    told = task.provenance(0, "test", 4)["sampling_seeds"]
    assert told == {e.id: e.sampling.seed for e in drawn[:4]}
    assert read("aime", tmp_path / "b").provenance(0, "test", 4) == {}
    assert read("gsm8k", tmp_path / "g", decode_budget=False).example(0, "test", 0).evicts_answers is False


def test_worked_problems_come_first_and_are_none_of_those_asked(tmp_path):
    rows = [{"question": f"{i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"} for i in range(3)]
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    example = read("gsm8k", tmp_path / "a", shots=2, shots_path=str(file)).example(0, "test", 0)
    assert example.segments[0].payload == (
        "Problem: 0 + 1?\nSolution: It is 1.\n#### 1\n\nProblem: 1 + 1?\nSolution: It is 2.\n#### 2\n\n"
        "Problem: Two mills with 600 lamps each?\n\n"
    )
    assert "main-2shots" in example.id
    assert "shots" not in read("gsm8k", tmp_path / "b").example(0, "test", 0).id
    with pytest.raises(ValueError, match=r"expected task\.gsm8k\.shots of at most 3, got 4"):
        read("gsm8k", tmp_path / "c", shots=4, shots_path=str(file)).example(0, "test", 0)
    with pytest.raises(ValueError, match=r"expected task\.gsm8k\.shots_path for shots from other rows than those"):
        read("gsm8k", tmp_path / "d", shots=1)
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(file.read_text().replace("+ 1", "+ 1" if name == "train" else "+ 9"))
    folder = BENCHMARKS["gsm8k"](path=str(tmp_path), shots=1).example(0, "test", 0)
    assert folder.segments[0].payload.startswith("Problem: 0 + 1?")
    assert folder.segments[0].payload.endswith("Problem: 0 + 9?\n\n")


def test_thoughts_come_first_and_the_letter_alone_is_scored(tmp_path):
    once, twice = (read("longbench_v2", tmp_path / str(i), chain_of_thought=bool(i)) for i in range(2))
    alone, (thought, letter) = once.example(0, "test", 0).turns[0], twice.example(0, "test", 0).turns
    assert (thought.scored, thought.max_new_tokens, letter.scored, letter.max_new_tokens) == (False, 1024, True, 128)
    assert thought.question.splitlines()[:-1] == alone.question.splitlines()[:-1]
    assert "correct answer is (letter)" in letter.question
    assert "correct answer" not in thought.question
    assert (letter.answer, letter.choices, letter.scorer) == (alone.answer, alone.choices, alone.scorer)
    example = twice.example(0, "test", 0)
    assert (example.id, example.meta["chance"]) == ("longbench_v2/train-cot/test/0", 0.25)
    assert example.meta["groups"]["difficulty x length"] == "easy x short"


def test_sets_are_read_in_turn_as_each_would_be_alone(tmp_path):
    (tmp_path / "kv_retrieval.jsonl").write_text(
        "\n".join(json.dumps(texts.infinite(f"Key {i}?", [f"v{i}"])) for i in range(3))
    )
    (tmp_path / "passkey.jsonl").write_text(json.dumps(texts.infinite("What is the pass key?", ["71432"])))
    task = BENCHMARKS["infinitebench"](path=str(tmp_path), sets=["kv_retrieval", "passkey"])
    assert task.available("test", 9) == 4
    ids = [task.example(0, "test", i).id for i in range(4)]
    parts = [("kv_retrieval", 0), ("passkey", 0), ("kv_retrieval", 1), ("kv_retrieval", 2)]
    assert ids == [f"infinitebench/{name}/test/{number}" for name, number in parts]
    alone = BENCHMARKS["infinitebench"](path=str(tmp_path), data_split="passkey").example(0, "test", 0)
    assert task.example(0, "test", 1) == alone
    assert replace(task, limit=1).available("test", 9) == 2
    with pytest.raises(ValueError, match=r"has 4 rows of split test in its sets, got index 4"):
        task.example(0, "test", 4)
    every = replace(task, sets=["all"])
    assert [member.data_split for member in every.members] == list(every.known())
    with pytest.raises(ValueError, match=r"task.infinitebench.path to be a hub id or a folder for several sets"):
        replace(task, path=str(tmp_path / "passkey.jsonl"))
    with pytest.raises(ValueError, match=r"task.infinitebench.data_split among passkey.*, got 'lookup'"):
        replace(task, sets=["lookup"])


def test_all_sets_are_those_of_the_authors(tmp_path):
    counts = {name: len(BENCHMARKS[name]().known()) for name in ("longbench", "scbench", "infinitebench", "mm_niah", "mmmu", "mmmu_pro")}  # fmt: skip
    assert counts == {"longbench": 21, "scbench": 12, "infinitebench": 12, "mm_niah": 6, "mmmu": 30, "mmmu_pro": 2}
    here = read("milebench", tmp_path)
    both = replace(task_of("milebench", FIXTURES["milebench"][1], tmp_path / "data"), sets=["all"])
    assert both.known() == ["ActionSequence", "TextNeedleInAHaystack"]
    assert [both.example(0, "test", i).meta["groups"]["set"] for i in range(2)] == both.known()
    assert both.example(0, "test", 0).turns == here.example(0, "test", 0).turns


def test_rows_are_counted_shuffled_and_set_apart(tmp_path, caplog):
    task = read("video_mme", tmp_path, shuffle=True)
    assert task.available("test", 64) == 4
    assert "video_mme has 4 rows of split test and 64 were asked for" in caplog.text
    orders = [[task.example(seed, "test", i).id for i in range(4)] for seed in range(4)]
    assert len({tuple(order) for order in orders}) > 1
    assert len({tuple(sorted(order)) for order in orders}) == 1
    apart = replace(task, shuffle=False, val_rows=1, limit=3)
    assert [apart.available(split, 9) for split in ("val", "test")] == [1, 2]
    assert apart.example(0, "val", 0).id == "video_mme/3-frames/val/0"
    assert apart.example(0, "test", 0).id == "video_mme/3-frames/test/1"


@pytest.mark.parametrize(
    ("changes", "split", "index", "sentence"),
    [
        ({}, "train", 0, "gsm8k has no rows of split train: they are for evaluation; train on other rows"),
        ({}, "val", 0, "set task.gsm8k.val_rows to set some apart"),
        ({}, "test", 2, "gsm8k has 2 rows of split test, got index 2"),
        ({"path": "nowhere.parquet"}, "test", 0, "gsm8k: cannot open .*nowhere.parquet.*; check task.gsm8k.path"),
    ],
)
def test_rows_that_are_not_there_are_refused_in_one_sentence(changes, split, index, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence) as told:
        replace(read("gsm8k", tmp_path), **changes).example(0, split, index)
    assert "\n" not in str(told.value)


def test_the_embedded_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"set model.prompt_style=natural and model.name"):
        read("gsm8k", tmp_path).example(0, "test", 0, style="symbolic")


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("gsm8k", {"path": ""}, "task.gsm8k.path to be a hub id, a file or a folder, got ''"),
        ("gsm8k", {"limit": 0}, "task.gsm8k.limit of at least 1, got 0"),
        ("gsm8k", {"val_rows": -1}, "task.gsm8k.val_rows of 0 or more, got -1"),
        ("gsm8k", {"max_tokens": 0}, "task.gsm8k.max_tokens of at least 1, got 0"),
        ("gsm8k", {"most_new_tokens": 0}, "task.gsm8k.most_new_tokens of at least 1, got 0"),
        ("aime", {"samples": 4}, "task.aime.temperature for several samples, got None"),
        ("aime", {"temperature": 0.0}, "a temperature above 0"),
        ("longbench", {"subset": "hotpot"}, "task.longbench.subset among narrativeqa"),
        ("scbench", {"subset": "kv"}, "task.scbench.subset among scbench_kv"),
        ("scbench", {"mode": "chat"}, "task.scbench.mode among multi_turn, same_context, got 'chat'"),
        ("infinitebench", {"data_split": "longbook_qa_en"}, "task.infinitebench.data_split among passkey"),
        ("longmemeval", {"history": "l"}, "task.longmemeval.history among oracle, s, m, got 'l'"),
        ("video_mme", {"frames": 0}, "task.video_mme.frames of at least 1, got 0"),
        ("longvideobench", {"frames": 0}, "task.longvideobench.frames of at least 1, got 0"),
    ],
)
def test_settings_without_meaning_are_refused(name, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        BENCHMARKS[name](**changes)


def test_a_gated_set_and_files_that_are_missing_are_said_in_one_sentence(tmp_path, monkeypatch):
    def gated(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError(
            "Dataset 'x' is a gated dataset on the Hub. You must be authenticated."
        )

    monkeypatch.setattr(datasets, "load_dataset", gated)
    with pytest.raises(
        ValueError, match=r"^longvideobench: cannot open .*longvideobench/LongVideoBench.*hf auth login$"
    ):
        BENCHMARKS["longvideobench"]().available("test", 1)
    with pytest.raises(ValueError, match=r"expected the file longmemeval_s_cleaned.json in .*, found none"):
        BENCHMARKS["longmemeval"](path=str(tmp_path)).available("test", 1)
    with pytest.raises(
        ValueError, match=r"unpack the archives of FreedomIntelligence/MileBench and set task.milebench.path"
    ):
        BENCHMARKS["milebench"]().available("test", 1)
    broken = replace(read("visual_haystacks", tmp_path), folder=str(tmp_path))
    with pytest.raises(ValueError, match=r"visual_haystacks: cannot read row 0: missing image: .*png"):
        broken.example(0, "test", 0)


def test_a_folder_of_files_named_after_its_parts_is_a_mirror_too(tmp_path):
    row = texts.longbench("hotpotqa", "Who?", ["Mara"])
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(row))
    example = BENCHMARKS["longbench"](path=str(tmp_path), subset="hotpotqa").example(0, "test", 0)
    assert (example.turns[0].answer, example.turns[0].max_new_tokens) == (["Mara"], 32)
    (tmp_path / "passkey.jsonl").write_text(json.dumps(texts.infinite("What is the pass key?", ["71432"])))
    assert BENCHMARKS["infinitebench"](path=str(tmp_path)).example(0, "test", 0).turns[0].answer == ["71432"]
    task = read("mm_niah", tmp_path)
    (tmp_path / "data" / "rows.jsonl").rename(tmp_path / "data" / "retrieval-text.jsonl")
    assert len(replace(task, path=str(tmp_path / "data")).example(0, "test", 0).images) == 2
