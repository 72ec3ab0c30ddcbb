# Sourced: installs Chromium where that is possible. With a browser there, the tests that need one must not be skipped.
browser() {
    command -v chromium || command -v chromium-browser || command -v google-chrome
}

if ! browser > /dev/null && command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium > /dev/null
fi
if browser > /dev/null; then
    export LLMT_REQUIRE_BROWSER=1
else
    echo "no Chromium, and no way to install it here: nobody looks at the HTML report" >&2
fi
