"""/tokenize and /detokenize, in vLLM's form."""

from __future__ import annotations

from step3_jax.server.error import bad_request
from step3_jax.server.prompt import build_chat_prompt
from step3_jax.server.protocol.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from step3_jax.server.service import Service

# The most characters of a text: many times a context, and encoded in seconds.
MAX_CHARACTERS = 2**20
# The most ids that a message names.
_MAX_NAMED = 8


async def tokenize(service: Service, request: TokenizeRequest) -> TokenizeResponse:
    """Token ids of a text or a conversation, as in its prompt.

    Raises:
      ApiError: 400 or 404.
    """
    service.choose_name(request.model)
    llm = service.llm
    if (request.prompt is None) == (request.messages is None):
        raise bad_request("prompt and messages are alternatives; give exactly one of them", "prompt")
    if request.prompt is not None and len(request.prompt) > MAX_CHARACTERS:
        raise bad_request(
            f"prompt has {len(request.prompt)} characters; at most {MAX_CHARACTERS} are allowed: send it in parts",
            "prompt",
        )
    if request.messages is not None:
        prompt = await build_chat_prompt(
            service,
            request.messages,
            request.tools,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            template_kwargs=request.chat_template_kwargs,
        )
        tokens = list(prompt.token_ids)
    else:
        add_bos = request.add_special_tokens is not False
        try:
            tokenizer = llm.get_tokenizer()
            tokens = await service.call(tokenizer.encode, request.prompt or "", add_bos=add_bos)
        except ValueError as error:
            raise bad_request(str(error), "prompt") from None
    texts = None
    if request.return_token_strs:
        tokenizer = llm.get_tokenizer()
        texts = await service.call(lambda: [tokenizer.decode([token]) for token in tokens])
    return TokenizeResponse(count=len(tokens), max_model_len=llm.max_model_len, tokens=tokens, token_strs=texts)


async def detokenize(service: Service, request: DetokenizeRequest) -> DetokenizeResponse:
    """Text of token ids.

    Raises:
      ApiError: 400 or 404.
    """
    service.choose_name(request.model)
    size = service.llm.config.text.vocab_size

    def decode() -> str:
        wrong = [token for token in request.tokens if not 0 <= token < size]
        if wrong:
            raise ValueError(f"tokens has {wrong[:_MAX_NAMED]}; token ids from 0 to {size - 1} are needed")
        return service.llm.get_tokenizer().decode(request.tokens)

    try:
        return DetokenizeResponse(prompt=await service.call(decode))
    except ValueError as error:
        raise bad_request(str(error), "tokens") from None
