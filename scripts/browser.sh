#!/usr/bin/env bash
# Print the path of a browser for playwright; where there is none, install one.
#
#   scripts/browser.sh [python]
#
# $BROWSER_PATH names one. Else a chromium or chrome on the PATH; else, as root on Debian or Ubuntu, the package `chromium` (350 MB, a minute);
# else the one that playwright downloads. `python` is an interpreter that has playwright.
set -euo pipefail

python=${1:-python3}

say() { echo "browser.sh: $*" >&2; }

one_that_is_here() {
  local name
  for name in ${BROWSER_PATH:-chromium chromium-browser google-chrome google-chrome-stable}; do
    # one that starts: Ubuntu's chromium-browser may be a stub that only names a snap
    if "$name" --version >/dev/null 2>&1; then
      command -v "$name"
      return
    fi
  done
  return 1
}

of_playwright() {
  "$python" - <<'PY'
import os, sys
from playwright.sync_api import sync_playwright

with sync_playwright() as playwright:
    path = playwright.chromium.executable_path
if not os.path.exists(path):
    sys.exit(1)
print(path)
PY
}

install_one() {
  if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    say "installing the package chromium"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } >&2 && return
    say "that failed"
  fi
  say "having playwright download chromium"
  "$python" -m playwright install chromium >&2
}

if [[ -n ${BROWSER_PATH:-} ]]; then
  one_that_is_here || { say "BROWSER_PATH=$BROWSER_PATH is no browser that starts"; exit 1; }
  exit
fi
one_that_is_here || of_playwright 2>/dev/null || { install_one && { one_that_is_here || of_playwright; }; } || {
  say "no browser found and none could be installed; name one with BROWSER_PATH=..."
  exit 1
}
