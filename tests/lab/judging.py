"""Programs that speak as a judge of hand-ins does: how they begin, and how they pass a criterion."""
BEGIN = """
import json, os, sys, time
ask = json.load(sys.stdin)
def say(**words):
    os.write(ask["pipe"], json.dumps({"nonce": ask["nonce"]} | words).encode() + b"\\n")
say()
"""
PASS = "say(check=ask['checks'][0], criterion='is even', state='pass', text='')\n"
