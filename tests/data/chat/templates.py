"""Chat templates of the kinds that models have, each written anew, with its own answer to what is to be trained.

« and » stand around what an assistant's turn says with its end-of-turn mark; the templates without them are what is
tested, the text between them is what must be trained.
"""

OPEN, CLOSE = "«", "»"

CALLS = (  # one <tool_call> a call, as Hermes and Qwen write it
    "{% for c in m.tool_calls or [] %}{% if m.content or not loop.first %}\n{% endif %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
)
LAST_QUESTION = (  # ns.last: the last user turn that is no tool's result
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
ALTERNATES = (
    "{% set ns = namespace(i=0) %}{% for m in messages %}{% if m.role in ('user', 'assistant') and not m.tool_calls %}"
    "{% if (m.role == 'user') != (ns.i % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set ns.i = ns.i + 1 %}{% endif %}{% endfor %}"
)

_WRITTEN = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}«{% endif %}{{ m.content }}"
        + CALLS
        + "<|im_end|>{% if m.role == 'assistant' %}»{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "reasoning of earlier turns is dropped, results of tools are the user's (Qwen 3)": (
        LAST_QUESTION + "{% for m in messages %}{% if m.role == 'tool' %}"
        "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}\n<tool_response>\n"
        "{{ m.content }}\n</tool_response>"
        "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
        "{% elif m.role == 'assistant' %}<|im_start|>assistant\n«"
        "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n')"
        " if '</think>' in m.content else '' %}"
        "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
        "{{ said }}" + CALLS + "<|im_end|>»\n"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "channels, other marks in the middle (gpt-oss)": (
        "<|start|>system<|message|>You help.<|end|>"
        "{% set ns = namespace(call=none) %}{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}"
        "{% set ns.call = m.tool_calls[0].function %}<|start|>assistant«"
        "{% if m.content %}<|channel|>commentary<|message|>{{ m.content }}<|end|><|start|>assistant{% endif %}"
        " to=functions.{{ ns.call.name }}<|channel|>commentary json<|message|>{{ ns.call.arguments | tojson }}<|call|>»"
        "{% elif m.role == 'assistant' %}<|start|>assistant«<|channel|>final<|message|>{{ m.content }}"
        "{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}»"
        "{% elif m.role == 'tool' %}{% if ns.call is none %}{{ raise_exception('no call before') }}{% endif %}"
        "<|start|>functions.{{ ns.call.name }} to=assistant<|channel|>commentary<|message|>{{ m.content }}<|end|>"
        "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    ),
    "EOS at the end of everything (Phi-3)": (
        "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}«{% endif %}{{ m.content }}" + CALLS
        + "<|end|>{% if m.role == 'assistant' and not loop.last %}»{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}"
        "{% if messages[-1].role == 'assistant' %}»{% endif %}{% endif %}"
    ),
    "another name for the assistant, trimmed texts, no system, roles alternate (Gemma)": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + ALTERNATES
        + "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{% if m.role == 'assistant' %}«{% endif %}{{ m.content | trim }}" + CALLS
        + "<end_of_turn>{% if m.role == 'assistant' %}»{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "the system's text stands in the last question (Mistral 0.3)": (
        LAST_QUESTION + "{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "[INST] {{ system if loop.last }}{{ m.content }}[/INST]"
        "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]"
        "{% elif m.role == 'assistant' and m.tool_calls %}«{{ m.content }}[TOOL_CALLS] ["
        "{% for c in m.tool_calls %}{{ ', ' if not loop.first }}{{ c.function | tojson }}{% endfor %}]{{ eos_token }}»"
        "{% elif m.role == 'assistant' %}« {{ m.content }}{{ eos_token }}»{% endif %}{% endfor %}"
    ),
    "a date, and one call a turn (Llama 3.1)": (
        "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday: {{ strftime_now('%d %b %Y') }}\n\n"
        "{{ messages[0].content if messages[0].role == 'system' }}<|eot_id|>"
        "{% for m in messages %}{% if m.role != 'system' %}<|start_header_id|>"
        "{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n{% if m.role == 'assistant' %}«{% endif %}"
        "{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call a turn') }}{% endif %}"
        "{% if m.content %}{{ raise_exception('no text beside a call') }}{% endif %}"
        "{% set call = m.tool_calls[0].function %}"
        '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}'
        "{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% if m.role == 'assistant' %}»{% endif %}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "generation opens the reasoning, answers are cut at its end (DeepSeek-R1)": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
        "{% elif m.role == 'tool' %}<|tool_output|>{{ m.content }}<|tool_output_end|>"
        "{% elif m.role == 'assistant' %}<|Assistant|>«{{ m.content.split('</think>')[-1] }}" + CALLS
        + "{{ eos_token }}»{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
    ),
    "generation opens the reasoning, which only the last turn shows (Nemotron)": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        "{% if loop.last and m.content.startswith('<think>') %}<think>\n«{{ m.content[7:].lstrip('\n') }}"
        "{% else %}«{{ m.content.split('</think>')[-1].strip() }}{% endif %}" + CALLS
        + "<|im_end|>»\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    ),
    "no mark at a turn's end (GLM)": (
        "[gMASK]<sop>{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n«{{ m.content }}"
        + CALLS
        + "»{% else %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "a mark between turns only": (
        "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}«{% endif %}{{ m.content }}" + CALLS
        + "{% if not loop.last %}<|end|>{% endif %}{% if m.role == 'assistant' %}»{% endif %}"
        "{% if not loop.last %}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|end|>\n<|assistant|>\n{% endif %}"
    ),
    "calls as elements, one a parameter (GLM 4.5, Qwen 3.5)": (
        LAST_QUESTION + "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}«"
        "{% if loop.index0 > ns.last %}{{ m.content }}"
        "{% else %}{{ m.content.split('</think>')[-1].strip() }}{% endif %}"
        "{% for c in m.tool_calls or [] %}\n<tool_call>{{ c.function.name }}"
        "{% for k, v in c.function.arguments.items() %}\n<parameter={{ k }}>{{ v }}</parameter>{% endfor %}"
        "\n</tool_call>{% endfor %}<|im_end|>»\n"
        "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "generation closes the reasoning, which turns may fill; a question is wanted (Qwen 3.5)": (
        LAST_QUESTION + "{% if ns.last < 0 %}{{ raise_exception('no question') }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        "{% if m.content.startswith('<think>') %}«{{ m.content }}"
        "{% else %}<think>\n\n</think>\n\n«{{ m.content }}{% endif %}" + CALLS + "<|im_end|>»\n"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
    ),
    "trimmed texts, a mark between turns only": (
        "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}«{% endif %}{{ m.content | trim }}"
        + CALLS
        + "{% if not loop.last %}<|end|>{% endif %}{% if m.role == 'assistant' %}»{% endif %}"
        "{% if not loop.last %}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|end|>\n<|assistant|>\n{% endif %}"
    ),
    "a line a turn, no header of its own": (
        "{% for m in messages %}{% if m.role == 'assistant' %}«{{ m.content }}" + CALLS + "{{ eos_token }}»"
        "{% else %}{{ m.role }}: {{ m.content }} ->{% endif %}\n{% endfor %}"
    ),
}
# transformers' Jinja drops a line's end behind a block; these mean it.
TEMPLATES = {kind: text.replace("%}\n", "%}{{ '\\n' }}") for kind, text in _WRITTEN.items()}
