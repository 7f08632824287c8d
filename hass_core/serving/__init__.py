"""An OpenAI-compatible server for trying a draft before it goes to an engine.

protocol (what requests say) ─► app (HTTP) ─► worker (one decoding thread, requests in turn) ─► text (visible answer)
"""
