"""Sources without commits (`model.url`): what is pinned is the digest of their listing.

probe.py        START HERE: can this process, with its own credentials, read these weights?
source.py       what a source is; its listing, and the digest that stands where a commit does
sketch.py       the model as far as it can be checked before it is downloaded
s3.py           S3, and whatever speaks its API
gcs.py          Google Cloud Storage
modelscope.py   ModelScope
web.py          bounded requests over HTTP, and words for refusals
words.py        one sentence for each outcome: what to do about it
"""
