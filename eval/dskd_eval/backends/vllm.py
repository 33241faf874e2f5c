"""Generation with vLLM, an optional extra, for one or several GPUs.

Written against `vllm.LLM` itself: the vLLM class of lm-eval 0.4.11 does not load with current vLLM versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from dskd_eval.backends.base import Generation, GenerationSettings, Prompt, Told, cut_at_stop, tell_nobody
from dskd_eval.backends.decoding import decode
from dskd_eval.backends.tokenizers import RendersChats, context_length, encode, end_tokens, load_tokenizer
from dskd_eval.errors import UserError
from dskd_eval.models import ModelFolder

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput


def require() -> ModuleType:
    """The vllm package. Raises UserError when it is not installed."""
    try:
        import vllm
    except ImportError as error:
        raise UserError(
            "--backend vllm",
            expected="the package vllm",
            got=str(error),
            fix="Install vllm in an environment of its own, or use --backend hf.",
        ) from error
    package: ModuleType = vllm
    return package


class VLLMBackend(RendersChats):
    """A vLLM engine. The whole task is one batch; vLLM schedules it."""

    kind = "vllm"
    pads = False
    told: Told = staticmethod(tell_nobody)
    default_batch_size = 4096

    def __init__(
        self, folder: ModelFolder, *, dtype: str = "auto", chat_template: str | None = None, seed: int = 0
    ) -> None:
        vllm = require()
        import transformers

        self.name = folder.name
        self.tokenizer = load_tokenizer(folder, chat_template)
        config = transformers.AutoConfig.from_pretrained(folder.weights, local_files_only=True)
        self.end_tokens = end_tokens(folder, self.tokenizer)
        self.template_options = dict(folder.ref.template_options)
        self.max_length = context_length(config, self.tokenizer)
        options: dict[str, object] = {}
        if folder.adapter is not None:
            options |= {"enable_lora": True, "max_lora_rank": 256}
        try:
            self.engine = vllm.LLM(
                model=str(folder.weights),
                tokenizer=str(folder.tokenizer),
                dtype=dtype,
                max_model_len=self.max_length,
                seed=seed,
                generation_config="vllm",
                **options,
            )
        except Exception as error:
            lines = str(error).splitlines()
            raise UserError(
                f"model {folder.weights}",
                expected="a model that vLLM can load here",
                got=f"{type(error).__name__}: {lines[0][:240] if lines else ''}",
                fix="Use --backend hf, or free the GPU.",
            ) from error
        self._lora = None
        if folder.adapter is not None:
            from vllm.lora.request import LoRARequest

            self._lora = LoRARequest("adapter", 1, str(folder.adapter))
        self._vllm = vllm
        self.parameters: int | None = None
        self.device = "cuda"
        self.dtype = dtype
        self.identity: Mapping[str, object] = {
            "fingerprint": folder.fingerprint,
            "dtype": dtype,
            "device": "vllm " + vllm.__version__,
        }

    def encode(self, text: str, *, special_tokens: bool) -> list[int]:
        ids = encode(self.tokenizer, text, special_tokens=special_tokens)
        return ids or [self.end_tokens[0] if self.end_tokens else 0]

    def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[Generation]:
        sampling = self._vllm.SamplingParams(
            max_tokens=settings.max_new_tokens,
            # vLLM would also stop within a reasoning trace.
            stop=None if settings.reasoning else list(settings.stop) or None,
            stop_token_ids=self.end_tokens or None,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k or -1,
            seed=settings.seed if settings.temperature > 0 else None,
        )
        outputs = self.engine.generate(
            [{"prompt_token_ids": prompt.tokens} for prompt in prompts],
            sampling,
            use_tqdm=False,
            lora_request=self._lora,
        )
        finished = [output.outputs[0] for output in outputs]
        return [self._finished(item, settings, prompt) for item, prompt in zip(finished, prompts, strict=True)]

    def _finished(self, item: CompletionOutput, settings: GenerationSettings, prompt: Prompt) -> Generation:
        finish = "length" if item.finish_reason == "length" else "stop"
        text = item.text
        if settings.reasoning:
            text = decode(self.tokenizer, item.token_ids, settings.reasoning, prompt.before)
        before = cut_at_stop(text, settings, prompt.opened)
        if before is not None:
            text, finish = before, "stop"
        return Generation(text, len(item.token_ids), finish)

    def likelihood_model(self, batch_size: int) -> NoReturn:
        raise UserError(
            "--backend vllm",
            expected="tasks that generate text",
            got="a task that ranks choices by likelihood",
            fix="Run that task with --backend hf.",
        )
