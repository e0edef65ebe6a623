#!/usr/bin/env bash
# Fails a build whose model memorizes more than it may.
#
#     gate.sh NEW [BASE]
#
# NEW   a report of memdiag (*.parquet), or a checkpoint, which is measured first
# BASE  the same, of what NEW must not be worse than: the two are compared example by example
#
# Exit code: 0 every rule holds, 1 one is broken, anything else: it could not be judged.
# $OUT gets it all: report.html for people, check.md and diff.md for a comment, *.xml (JUnit), *.json and *.parquet.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
RULES=${RULES:-$here/rules.toml}  # what must hold of NEW
CHANGE=${CHANGE:-em_full: +0.05}  # how far the mean of a column may move from BASE's: up to +, down to -
CONFIDENCE=${CONFIDENCE:-0.95}    # of the comparison; each rule of $RULES has its own
DATA=${DATA:-}                    # the examples of a checkpoint; default: those that it was trained on
OUT=${OUT:-memdiag-gate}          # a directory
FORMAT=${FORMAT:-table}           # of the log: table, github, markdown, json, junit
if [ "${GITHUB_ACTIONS:-}" = true ]; then FORMAT=github; fi # annotations, and the summary of the step

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  echo "usage: ${0##*/} NEW [BASE]" >&2
  exit 2
fi
mkdir -p "$OUT"
# what an earlier run left must not pass for what this one found
rm -rf "$OUT"/{check,diff}.{xml,json,md} "$OUT"/{check,new,base}.parquet "$OUT/diff"
rm -f "$OUT/report.html" || true

# report_of THING NAME: the path of its report; a checkpoint is measured into $OUT/NAME.parquet.
# Every option of memdiag score is an environment variable as well, e.g. MEMDIAG_SCORE_PREFIX_TOKENS=50.
report_of() {
  case $1 in
    *.parquet) echo "$1" ;;
    *) memdiag score "$1" ${DATA:+--data "$DATA"} --out "$OUT/$2.parquet" --quiet ;;
  esac
}

# judge NAME COMMAND...: the verdicts in the log, then the same for those who read files.
broken=0
judge() {
  local name=$1 status=0 format
  shift
  memdiag "$@" --format "$FORMAT" || status=$?
  if [ "$status" -gt 1 ]; then exit "$status"; fi # no verdict: a typo in a rule, a damaged report
  if [ "$status" -eq 1 ]; then broken=1; fi
  for format in junit:xml json:json markdown:md; do
    memdiag "$@" --format "${format%:*}" --quiet >"$OUT/$name.${format#*:}" || [ $? -eq 1 ]
  done
}

new=$(report_of "$1" new)
pages=("$new")
judge check check "$new" --rules "$RULES" --out "$OUT/check.parquet"
pages+=("$OUT/check.parquet")
if [ $# -eq 2 ]; then
  base=$(report_of "$2" base)
  judge diff diff "$base" "$new" --rule "$CHANGE" --confidence "$CONFIDENCE" --out "$OUT/diff"
  pages+=("$OUT/diff")
fi
# the page is for reading: without it the verdict is the same
memdiag report "${pages[@]}" --html "$OUT/report.html" --quiet || echo "gate: no page" >&2
exit "$broken"
