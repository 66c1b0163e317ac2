"""Completions against transformers' own `generate`, draws by hand, prompts from every kind of row."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from dpo_ds.config import GenerationSection
from dpo_ds.data.prompts import read_prompts
from dpo_ds.demo.tiny import random_model, special_ids, tiny_config, train_tokenizer
from dpo_ds.errors import DataError, ModelError
from dpo_ds.models.causal_lm import LogProbModel
from dpo_ds.models.generation import Generator, as_completions, in_rounds, inverse_cdf, truncated
from tests.data_helpers import BOS, CHATML, tokenizer, write_lines

TEXTS = ["The kettle is great.", "A", "I find the tent", " awful", "What a lovely", "Buy it honestly, they say, or"]


@pytest.fixture(scope="module")
def words():
    return train_tokenizer(TEXTS, vocab_size=300)


def replica(causal_lm):
    """As engine.Replica, which brings deepspeed in."""
    return SimpleNamespace(
        engine=LogProbModel(causal_lm).requires_grad_(False).eval(), causal_lm=causal_lm,
        device=torch.device("cpu"), padded_attention=causal_lm.config._attn_implementation,
    )  # fmt: skip


def generator_of(words, family="llama", scale=8.0, **settings) -> Generator:
    """A random model whose head is blown up, so that it is not indifferent between tokens."""
    causal_lm = random_model(tiny_config(family, len(words), hidden=32, layers=2, **special_ids(words)))
    causal_lm.get_output_embeddings().weight.data *= scale
    return Generator(replica(causal_lm), words, GenerationSection(**settings), together=False)


def ids_of(words, texts) -> list[np.ndarray]:
    return [np.array(words(text)["input_ids"]) for text in texts]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_greedy_completions_are_those_of_transformers(words, family):
    """Ours in batches of three with left padding, theirs one by one; mistral's and gemma2's windows are exceeded."""
    generator = generator_of(words, family, scale=1.0, temperature=0, max_new_tokens=66, batch_size=3)
    prompts = ids_of(words, TEXTS)
    for prompt, [ours] in zip(prompts, generator(prompts, 1), strict=True):
        theirs = generator.model.causal_lm.generate(
            torch.from_numpy(prompt)[None], do_sample=False, max_new_tokens=66, pad_token_id=0
        )[0, len(prompt) :]
        assert ours.ids.tolist() == theirs.tolist()


def test_a_completion_is_its_rows_whatever_is_drawn_beside_it(words):
    settings = {"max_new_tokens": 30, "batch_size": 5, "seed": 3}
    generator, prompts = generator_of(words, **settings), ids_of(words, TEXTS)
    drawn = generator(prompts, 3)
    for row in (0, 4):
        [alone] = generator(prompts[row : row + 1], 3, first_row=row)
        assert [one.ids.tolist() for one in alone] == [one.ids.tolist() for one in drawn[row]]
    of_rows = {tuple(one.ids) for own in drawn for one in own}
    assert len(of_rows) == 18, "n draws of a prompt differ"
    other = generator_of(words, **settings | {"seed": 4})(prompts, 3)
    assert other[0][0].ids.tolist() != drawn[0][0].ids.tolist()


def test_eos_is_kept_and_ends_a_completion(words):
    generator = generator_of(words, max_new_tokens=40, batch_size=64)
    head = generator.model.causal_lm.get_output_embeddings()
    head.weight.data *= 0  # all 300 tokens alike
    head.bias = torch.nn.Parameter(torch.zeros(len(words)))
    head.bias.data[words.eos_token_id] = np.log(len(words) - 1)  # EOS: 299 of 598
    drawn = [one for own in generator(ids_of(words, TEXTS), 100) for one in own]
    lengths = [len(one.ids) for one in drawn]
    assert np.mean(lengths) == pytest.approx(2, abs=0.2), "geometric, of mean 2 and deviation 1.4; 600 of them"
    for one in drawn:
        assert one.finished and one.ids[-1] == words.eos_token_id and words.eos_token_id not in one.ids[:-1]
        assert words.eos_token not in one.text
    generator.settings = GenerationSection(max_new_tokens=5, min_new_tokens=5)
    assert all(len(one.ids) == 5 and not one.finished for [one] in generator(ids_of(words, TEXTS), 1))
    head.bias.data[7] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        generator(ids_of(words, TEXTS), 1)


def test_a_chat_models_end_of_turn_ends_a_completion_too(words):
    causal_lm = random_model(tiny_config("llama", len(words), hidden=32, layers=1, **special_ids(words)))
    causal_lm.generation_config.eos_token_id = [5, words.eos_token_id]
    causal_lm.generation_config.repetition_penalty = 100.0  # not our distribution
    assert Generator(replica(causal_lm), words, GenerationSection(), together=False).stops == [1, 5]


def byte_fallback() -> PreTrainedTokenizerFast:
    """Decodes as Llama 2's: bytes that follow each other are one character or, all of them, broken ones."""
    vocab = {token: i for i, token in enumerate(["<eos>", "▁hi", "▁yes", *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)


def test_a_broken_byte_brings_no_prompt_into_the_text(words):
    hi, yes, first_byte = 1, 2, 3
    prompt = np.array([hi, *(first_byte + byte for byte in "😀".encode())])
    broken, whole = [first_byte + 0x80, yes, 0], [first_byte + byte for byte in "é".encode()]
    drawn = [np.array(ids) for ids in (broken, whole, [yes, 0])]
    completions = as_completions(byte_fallback(), [0], prompt, drawn)
    assert byte_fallback().decode([*prompt, *broken]) == "hi" + 5 * "\N{REPLACEMENT CHARACTER}" + " yes<eos>"
    assert [one.text for one in completions] == ["\N{REPLACEMENT CHARACTER} yes", "é", " yes"]
    assert [one.finished for one in completions] == [True, False, True]
    [ids] = ids_of(words, ["A😀"])  # no merge of its four bytes was learned
    [cut] = as_completions(words, [0], ids[:-2], [ids[-2:]])
    assert words.decode(ids) == "A😀" and cut.text == 2 * "\N{REPLACEMENT CHARACTER}"


def test_inverse_cdf_by_hand():
    """Shares of 1, 2, 0 and 5 eighths; a share of the total, so the weights need not add up to 1."""
    probs = torch.tensor([[1.0, 2.0, 0.0, 5.0]]).expand(6, 4)
    uniforms = torch.tensor([0.0, 0.124, 0.126, 0.374, 0.376, 1 - 2**-53], dtype=torch.float64)
    tokens, total = inverse_cdf(probs, uniforms)
    assert tokens.tolist() == [0, 0, 1, 1, 3, 3] and total.tolist() == [8.0] * 6


def test_inverse_cdf_over_several_blocks_is_the_plain_one():
    generator = np.random.default_rng(0)
    probs = generator.random((500, 700)) * (generator.random((500, 700)) < 0.1)
    uniforms = generator.random(500)
    cumulative = probs.astype(np.float32).astype(np.float64).cumsum(1)
    plain = [np.searchsorted(row, u * row[-1], side="right") for row, u in zip(cumulative, uniforms, strict=True)]
    tokens, _ = inverse_cdf(torch.from_numpy(probs).float(), torch.from_numpy(uniforms))
    assert np.mean(tokens.numpy() == plain) > 0.99, "they may part where the uniform number is at an edge"
    assert (probs[np.arange(500), tokens] > 0).all()


def test_truncation_by_hand():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
    assert torch.isfinite(truncated(logits, 2, 1.0)).tolist() == [[False, True, False, True]]
    assert torch.isfinite(truncated(logits, 0, 0.69)).tolist() == [[False, True, False, True]]
    assert torch.isfinite(truncated(logits, 0, 0.71)).tolist() == [[False, True, True, True]]
    assert torch.isfinite(truncated(logits, 0, 0.01)).sum() == 1
    assert truncated(logits, 0, 1.0) is logits


def test_rounds_give_every_rank_as_many_turns():
    assert [list(in_rounds("abcde", rank, 2)) for rank in (0, 1)] == [["a", "c", "e"], ["b", "d", None]]


class TestPrompts:
    OPTIONS = SimpleNamespace(format="auto", columns={}, max_prompt_length=1000, on_bad_row="error", ignore_columns=[])

    def read(self, source, tok=None, limit=None, **changes):
        options = SimpleNamespace(**{**vars(self.OPTIONS), **changes})
        return read_prompts(source, options=options, tokenizer=tok or tokenizer(), limit=limit)

    def test_every_kind_of_row(self, tmp_path):
        user = [{"role": "user", "content": "hi"}]
        answers = {"chosen": "yes", "rejected": "no"}
        transcript = "\n\nHuman: hi\n\nAssistant:"
        rows = [
            ({"prompt": "hi"}, "hi"),
            ({"prompt": user}, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
            ({"messages": user}, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
            ({"prompt": "hi", **answers}, "hi"),
            ({"chosen": f"{transcript} yes", "rejected": f"{transcript} no"}, transcript),
            ({"chosen": f"{transcript} yes"}, transcript),
            (
                {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "yes"}},
                "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
            ),
        ]
        for row, text in rows:
            [prompt] = self.read(str(write_lines(tmp_path / "rows.jsonl", [row])), tokenizer(template=CHATML)).rows
            assert prompt.text == text and prompt.location.endswith("rows.jsonl:1")
            assert tokenizer().decode(prompt.ids) == text

    def test_text_files_mixtures_and_limits(self, tmp_path):
        (tmp_path / "a.txt").write_text("one\n\ntwo \nthree\n")
        (tmp_path / "b.txt").write_text("four")
        a, b = str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
        assert [p.text for p in self.read(a).rows] == ["one", "two ", "three"]
        mixed = self.read([{"path": a, "weight": 0.67}, {"path": b, "weight": 2.0}])
        assert [p.text for p in mixed.rows] == ["one", "two ", "four", "four"]
        assert [p.text for p in self.read([a, b], limit=2).rows] == ["one", "two "]

    def test_a_long_prompt_is_cut_from_its_start_behind_bos(self, tmp_path):
        (tmp_path / "a.txt").write_text("abcdef\nab\n")
        read = self.read(str(tmp_path / "a.txt"), tokenizer(bos=True), max_prompt_length=4)
        assert [tokenizer().decode(p.ids) for p in read.rows] == [f"{BOS}def", f"{BOS}ab"]
        assert read.rows[0].text == "abcdef" and read.summary() == "2 prompts, 1 cut from their start"

    def test_what_is_not_read_is_named(self, tmp_path):
        (tmp_path / "set").mkdir()
        for name in ("test.csv", "train.csv"):
            (tmp_path / "set" / name).write_text("question,answer\nhi,4\n")
        read = self.read(str(tmp_path / "set"), columns={"prompt": "question"})
        assert read.summary() == f"1 prompts; columns not used: answer; not read: {tmp_path}/set/test.csv"
        with pytest.raises(DataError, match=r"a.jsonl:1: 'system' is 'be brief', which nothing here can use"):
            self.read(str(write_lines(tmp_path / "a.jsonl", [{"prompt": "hi", "system": "be brief"}])))
        messages = [{"role": "user", "content": "hi"}]
        chat = self.read(str(write_lines(tmp_path / "a.jsonl", [{"prompt": messages, "system": "be brief"}])))
        assert "be brief" in chat.rows[0].text and "columns" not in chat.summary()

    def test_rows_without_a_prompt(self, tmp_path):
        path = str(write_lines(tmp_path / "a.jsonl", [{"prompt": "hi"}, {"prompt": 3}, {"text": "x"}, {"prompt": ""}]))
        read = self.read(path, on_bad_row="skip")
        assert len(read.rows) == 1 and read.census.rows_read == 4 and sum(read.census.dropped.values()) == 3
        assert "1 prompts, 1 dropped: wrong type" in read.summary() and "a.jsonl:2" in read.summary()
        with pytest.raises(DataError, match=r"a\.jsonl:2: 'prompt' is int 3.*on_bad_row skip"):
            self.read(path)
        empty = str(write_lines(tmp_path / "b.jsonl", [{"prompt": ""}]))
        with pytest.raises(DataError, match=r"b\.jsonl:1: the prompt is empty and the tokenizer adds no BOS"):
            self.read(empty)
        assert len(self.read(empty, tokenizer(bos=True)).rows) == 1
        with pytest.raises(DataError, match=r"b\.jsonl: gives no prompt out of 1 rows; the first row: .*:1"):
            self.read(empty, on_bad_row="skip")
        (tmp_path / "c.json").write_text(json.dumps([{"prompt": [{"role": "user"}]}]))
        with pytest.raises(DataError, match=r"c\.json:1: prompt\[0\] has no content"):
            self.read(str(tmp_path / "c.json"))
