"""Our side of scripts/bench_kvpress.py: what kvpress_worker.py does for kvpress, done by this package."""

from typing import Any

import torch
from kvpress_page import SAFEGUARD
from kvpress_worker import MeasuredSide, described, gap, generated, measure, padded_batch


class Ours(MeasuredSide):
    """Answers requests with this package."""

    answers = ("logits", "run", "checks")

    def run(
        self, method: str, prompt: int, kept: int, new_tokens: int, trace: str | None = None, one_layer: bool = False
    ) -> dict:
        """One row, prefill and decoding inside the block."""
        from transformers import DynamicCache

        import retention as rt

        model = self.one_layer if one_layer else self.model
        ids, file = self.ids[:, :prompt], self.folder / trace if trace else None
        if method == "full":
            shape = model.config
            every = {"kept": prompt * shape.num_hidden_layers * shape.num_key_value_heads, "kept_least": prompt, "kept_most": prompt}  # fmt: skip
            stock = DynamicCache(config=shape)
            return measure(model, ids, new_tokens, stock, after_prefill=lambda: every, trace=file)
        config = rt.CacheConfig(budget=rt.Budget(kept), allocator="uniform")
        if method == "knorm_global":
            config = rt.CacheConfig(
                budget=rt.Budget(kept), allocator="global", min_per_head=max(1, int(SAFEGUARD * kept))
            )
        policy = rt.POLICIES["full" if method == "full_own" else "knorm"]()
        with rt.evicting(model, policy, config) as cache:

            def after_prefill() -> dict:
                table = cache.kept()
                least, most = table.min(), table.max()
                return {
                    "kept": int(table.sum()), "kept_least": int(least), "kept_most": int(most),
                    "ledger_bytes": cache.bytes().total,
                }  # fmt: skip

            return measure(model, ids, new_tokens, cache, after_prefill=after_prefill, trace=file)

    @torch.no_grad()
    def checks(self) -> dict:
        """Our behaviour at 50% in the situations of kvpress's checks."""
        import retention as rt

        model, half = self.model, rt.Budget(0.5, "fraction")
        batch, alone = padded_batch(self.ids)

        def opened(method: str = "knorm", **settings: Any) -> Any:
            return rt.evicting(model, rt.POLICIES[method](), rt.CacheConfig(budget=half, **settings))

        logits = {}
        for method in ("full", "knorm"):
            for inputs, name in ((batch, "batch"), (alone, "alone")):
                with opened(method) as cache:
                    logits[method, name] = generated(model, inputs, cache)
                    if (method, name) == ("knorm", "batch"):
                        padded_kept = int(cache.kept()[0, 1, 0]) - 1  # without the token that was generated
        found = {
            "padded_difference_full": gap(logits["full", "batch"], logits["full", "alone"]),
            "padded_difference": gap(logits["knorm", "batch"], logits["knorm", "alone"]),
            "padded_kept": padded_kept,
            "padded_kept_padding": 0.0,  # entries of ours are counted without padding
        }
        with opened(prefill_chunk=64) as cache:
            model(input_ids=self.ids[:, :128], past_key_values=cache)
            found["chunked_kept"] = int(cache.kept().max())
        steps = []
        for place in (None, torch.tensor([[128]])):
            with opened() as cache:
                model(input_ids=self.ids[:, :128], past_key_values=cache)
                steps.append(model(input_ids=self.ids[:, 128:129], past_key_values=cache, position_ids=place).logits)
        found["positions_difference"] = gap(*steps)
        with opened(allocator="global") as cache:
            model(input_ids=self.ids[:, :128], past_key_values=cache)
            try:
                place = torch.arange(128, 176)[None]
                model(input_ids=self.ids[:, 128:176], past_key_values=cache, position_ids=place)
                found["follow_up"] = "ran"
            except Exception as error:
                found["follow_up"] = described(error)
        return found
