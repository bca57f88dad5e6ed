#!/bin/sh
# Prints the path of a Chrome or Chromium; on Debian as root it installs one where there
# is none. CHROME names one.
set -eu

find_browser() {
    if [ -n "${CHROME:-}" ]; then
        command -v "$CHROME" && return
        echo "CHROME must name a Chrome or Chromium: got $CHROME, which cannot be run." >&2
        exit 1
    fi
    for name in chromium google-chrome google-chrome-stable chromium-browser \
        "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome" \
        "/Applications/Chromium.app/Contents/MacOS/Chromium"; do
        command -v "$name" && return
    done
    return 1
}

# chromium alone has no font to show text with.
install_debian() {
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        chromium fonts-dejavu-core >/dev/null
}

find_browser && exit

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "No Chrome or Chromium was found. On Debian: apt-get install chromium" \
        "fonts-dejavu-core (as root). On a Mac: brew install --cask google-chrome." \
        "Or name one: make test-clients CHROME=/path/to/chrome" >&2
    exit 1
fi
echo "Installing chromium (about 350 MB, once) ..." >&2
# The package lists may be missing, or older than the packages.
install_debian 2>/dev/null || { apt-get update -qq && install_debian; }
find_browser
