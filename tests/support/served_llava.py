"""OpenAI's chat protocol in front of a real model of transformers: replies, schemas and log-probabilities are computed."""

import base64
import io
import json
import re
import threading

import torch
from PIL import Image
from transformers import LogitsProcessorList

from artaug.critics.constrained import SchemaDecoding


def answers_with(model, processor):
    """A behavior of `support.faulty_server.faulty_server`: decode greedily, and list as many log-probabilities as requested.

    They are those of the model, before the schema is imposed, as vLLM's and llama.cpp's are.
    """
    lock = threading.Lock()  # torch's modules may be called from many threads, llguidance's matchers are made for one

    def respond(exchange):
        with lock:
            body = _complete(model, processor, exchange.request)
        exchange.send(json.dumps(body).encode())

    return respond


@torch.inference_mode()
def _complete(model, processor, request):
    inputs = encode(processor, [_of_chat(message) for message in request["messages"]])
    limit, processors = request["max_tokens"], LogitsProcessorList()
    if "response_format" in request:
        decoding = SchemaDecoding(processor.tokenizer, eos_token_ids=[model.generation_config.eos_token_id])
        schema = request["response_format"]["json_schema"]["schema"]
        processors.append(decoding.logits_processor([schema], max_new_tokens=limit))
    output = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=limit,
        pad_token_id=processor.tokenizer.pad_token_id,
        logits_processor=processors,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
    ended = int(tokens[-1]) == model.generation_config.eos_token_id
    choice = {
        "index": 0,
        "finish_reason": "stop" if ended else "length",
        "message": {"role": "assistant", "content": processor.tokenizer.decode(tokens, skip_special_tokens=True)},
    }
    if request.get("logprobs"):
        logprobs = torch.cat(output.logits).float().log_softmax(dim=-1)
        entries = zip(tokens.tolist(), logprobs, strict=True)
        choice["logprobs"] = {
            "content": [_entry(processor.tokenizer, *entry, request["top_logprobs"]) for entry in entries]
        }
    counts = {"prompt_tokens": inputs["input_ids"].shape[1], "completion_tokens": len(tokens)}
    return {"object": "chat.completion", "choices": [choice], "usage": counts}


@torch.no_grad()
def forward_shares(model, processor, message, schema, choices, *, max_new_tokens):
    """Of each choice, the probability of all tokens that are it, by one forward call with the model's reply up to there.

    The reply is the model's own on the schema; its last token that is a choice counts.
    """
    tokenizer, inputs = processor.tokenizer, encode(processor, [message])
    decoding = SchemaDecoding(tokenizer, eos_token_ids=[model.generation_config.eos_token_id])
    processors = LogitsProcessorList([decoding.logits_processor([schema], max_new_tokens=max_new_tokens)])
    limits = {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    sequence = model.generate(**inputs, do_sample=False, logits_processor=processors, **limits)
    start = inputs["input_ids"].shape[1]
    place = max(
        index
        for index in range(start, sequence.shape[1])
        if tokenizer.decode([int(sequence[0, index])]).strip(' "}') in choices
    )
    inputs["input_ids"] = sequence[:, :place]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    probabilities = model(**inputs).logits[0, -1].double().softmax(dim=-1)
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    return [
        sum(
            float(probability)
            for text, probability in zip(texts, probabilities, strict=False)
            if re.fullmatch(rf"[\W_]*{choice}[\W_]*", text, re.IGNORECASE)
        )
        for choice in choices
    ]


def encode(processor, messages):
    """The model's inputs for messages of transformers, up to where its reply begins."""
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def _of_chat(message):
    """A message of OpenAI's protocol as transformers has it."""
    if isinstance(message["content"], str):
        return {"role": message["role"], "content": [{"type": "text", "text": message["content"]}]}
    parts = [
        {"type": "image", "image": _picture(part["image_url"]["url"])} if part["type"] == "image_url" else part
        for part in message["content"]
    ]
    return {"role": message["role"], "content": parts}


def _picture(url):
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def _entry(tokenizer, token, logprobs, count):
    top = logprobs.topk(min(count, len(logprobs)))
    listed = zip(top.values.tolist(), top.indices.tolist(), strict=True)
    return {
        "token": tokenizer.decode([token]),
        "logprob": float(logprobs[token]),
        "top_logprobs": [{"token": tokenizer.decode([index]), "logprob": logprob} for logprob, index in listed],
    }
