#!/usr/bin/env bash
# Installs the Debian packages that atp builds and tests with. Does nothing, quickly, when all are there.
#   scripts/install_deps.sh          to build, run and test
#   scripts/install_deps.sh --fuzz   and what the fuzzers need
set -euo pipefail

packages=(
  build-essential cmake ninja-build ccache git pkg-config clang-format-14
  libgrpc++-dev protobuf-compiler protobuf-compiler-grpc libprotobuf-dev libabsl-dev libspdlog-dev nlohmann-json3-dev
  libsentencepiece-dev prometheus-cpp-dev libboost-dev libyaml-cpp-dev libcli11-dev libpcre2-dev libicu-dev libssl-dev libhwy-dev
  libgtest-dev libgmock-dev
  python3 python3-numpy python3-grpcio python3-protobuf python3-requests python3-yaml python3-venv prometheus curl
)
case "${1:-}" in
  "") ;;
  --fuzz) packages+=(clang libclang-rt-14-dev) ;;
  *) echo "usage: $0 [--fuzz]" >&2; exit 2 ;;
esac

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  echo "make deps installs Debian packages, and this is not a Debian system." >&2
  echo "Install the equivalents of these, then run the command again with DEPS=skip:" >&2
  echo "  ${packages[*]}" >&2
  exit 1
fi

# One query; a package that dpkg has never heard of is simply not in the answer.
installed=$(dpkg-query -W -f='${db:Status-Abbrev} ${Package}\n' "${packages[@]}" 2>/dev/null | sed -n 's/^ii  *//p' || true)
missing=()
for package in "${packages[@]}"; do
  grep -qxF -- "$package" <<<"$installed" || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then exit 0; fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null; then
    echo "These Debian packages are missing, and neither are you root nor is there sudo:" >&2
    echo "  ${missing[*]}" >&2
    echo "Ask an administrator to run:  apt-get install ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi

echo "installing ${#missing[@]} Debian packages: ${missing[*]}"
environment=(env DEBIAN_FRONTEND=noninteractive)
# ${a[@]+...}: an empty array is "unset" to older shells under set -u.
run() { ${as_root[@]+"${as_root[@]}"} "${environment[@]}" "$@"; }
if ! run apt-get update -q || ! run apt-get install -q -y --no-install-recommends "${missing[@]}"; then
  echo "apt-get could not install: ${missing[*]}" >&2
  echo "Check the network and /etc/apt/sources.list (Debian 12 main has all of them), then run 'make deps' again." >&2
  exit 1
fi
