#!/usr/bin/env bash
# The editing page in a real browser, and the examples that need packages which the other tests do without.
set -euo pipefail
if ! command -v chromium chromium-browser google-chrome chrome >/dev/null; then
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } ||
    echo "no browser could be installed: its test skips, and says so"
fi
pip install -q playwright uvicorn accelerate transformers
python -m pytest -q -n 2 --dist loadfile tests/serve/test_browser.py tests/test_examples.py -k "browser or accelerate or patch_your"
