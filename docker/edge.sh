#!/bin/sh
# An edge of docker-compose.yml: makes its private text, waits for the token that was left for it, runs the daemon.
# Usage: edge.sh MODULE (of the standard library: its sources are the text)
set -eu

[ -e /state/coordinator.json ] || rm -f /token/token # an earlier run's: used or expired
if [ ! -s /data/notes.txt ]; then
  python -c 'import sys; from isthmus.split.data.stdlib_text import private_text; print(private_text(sys.argv[1]), end="")' "$1" \
    > /data/notes.new
  mv /data/notes.new /data/notes.txt
fi
until [ -s /token/token ]; do sleep 1; done
exec isthmus-client run --coordinator coordinator:7443 --token-file /token/token --state-dir /state \
  --data notes=/data/notes.txt --threads 1
