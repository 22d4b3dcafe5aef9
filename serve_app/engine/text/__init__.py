"""Text and token ids: prompts in, completions out. No tensors.

prompt.py          validates a request and encodes its prompt
conversation.py    a conversation to text by the model's chat template
chat_template.py   renders templates within limits
history.py         forms of a conversation for templates that refuse the one that was sent
special_tokens.py  which tokens are added, hidden, ends
text_work.py       a bounded amount of it at a time, off the event loop
completion.py      one completion as its reader sees it: ids in, deltas out
detokenizer.py     ids back to text, never half a character
reasoning.py       a model's thoughts before its answer
stop.py            stop strings, wherever the pieces are cut
"""
