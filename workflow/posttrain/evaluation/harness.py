"""lm-eval's model on transformers, with a beam search in which each beam ends at a stop text of its own."""

from lm_eval.models.huggingface import HFLM


class Harness(HFLM):
    """lm-eval's own criterion looks at as many rows as there are questions, which in a beam search are the beams of the
    first ones, and ends them all at once; transformers' looks at each."""

    def _model_generate(self, context, max_length: int, stop: list[str], **generation_kwargs):
        if generation_kwargs.get("num_beams", 1) == 1:
            return super()._model_generate(context, max_length, stop, **generation_kwargs)
        if not generation_kwargs.get("do_sample"):
            generation_kwargs.pop("temperature", None)
        return self.model.generate(
            input_ids=context,
            max_length=max_length,
            stop_strings=stop,
            tokenizer=self.tokenizer,
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            **generation_kwargs,
        )
