"""An OpenAI-compatible server for trying a draft before it goes to an engine.

connection ─► limits ─► protocol (what requests say) ─► messages (the prompt) ─► worker (one decoding thread, requests
in turn) ─► text (visible answer); app and service join them
"""
