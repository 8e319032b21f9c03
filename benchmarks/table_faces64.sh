#!/usr/bin/env bash
# The tables docs/table_faces64.md and docs/equi_faces64/: every sampler and task, without and with EquiReg.
#
#   bash benchmarks/table_faces64.sh tune SAMPLER TASK KEY VALUES    an option of the sampler, val faces: tune psld
#                                                                    super_resolution model.omega 1,2,4
#   bash benchmarks/table_faces64.sh tune_lambda FORM SAMPLER TASK VALUES   the weight of EquiReg (or KEY=VALUES), val faces
#   bash benchmarks/table_faces64.sh row FORM SAMPLER [TASK ...]     test faces, the five linear tasks unless some are named;
#                                                                    nonlinear: hdr, phase_retrieval (docs: COUNT=25, COUNT=10)
#   bash benchmarks/table_faces64.sh tables                          docs/table_faces64.md, docs/equi_faces64/ of all rows so far
#
# A finished row's metrics.csv is kept in benchmarks/results/faces64/TASK/FORM/SAMPLER: `cli.py compare` puts a run of
# your own sampler on the same faces beside it.
#
# SAMPLER is the beginning of a file's name in configs/sampler/faces64, or measurement_baseline, or linear_mmse.
# FORM is base, equi, equicon, or more: the base sampler with as many more steps as its Equi form takes time, from files
# SAMPLER_more*.yaml.
# Runs are resumable; those of other samplers can run beside each other.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
ROOT=${ROOT:-runs/table_faces64}
RESULTS=benchmarks/results/faces64
COUNT=${COUNT:-50}
TASKS="super_resolution gaussian_deblur motion_deblur random_inpainting box_inpainting"
NONLINEAR="hdr phase_retrieval"
LATENT="psld resample latent_daps"
PIXEL="dps mcg ddrm diffpir mpgd mpgd_ae sitcom daps"

searched=${SEARCHED:-16}  # val faces of a search, spread over the split: neighbours in it are pictures of one person
val=(-c configs/data/faces64_val.yaml "--data.indices=[$(seq -s, 0 $((935 / searched)) $((935 / searched * (searched - 1))))]")
common=(--data.batch_size=25 --trainer.devices=1 --trainer.precision=bf16-mixed --root="$ROOT")

first() { for file in "$@"; do [ -f "$file" ] && { echo "$file"; return; }; done; return 1; }
sampler_file() {
  case $1 in
    measurement_baseline|linear_mmse) echo "configs/sampler/$1.yaml" ;;
    *) first "configs/sampler/faces64/$1_$2.yaml" "configs/sampler/faces64/$1.yaml" ;;
  esac
}
equi_file() {
  local infix=$([ "$1" = equicon ] && echo _equicon || echo "")
  first "configs/equireg/faces64/$2${infix}_$3.yaml" "configs/equireg/faces64/$2$infix.yaml"
}
experiment() {  # FORM SAMPLER TASK: the options of one experiment, in ARGUMENTS; fails where a file is missing
  local form=$1 sampler=$2 task=$3 file
  file=$(sampler_file "$sampler$([ "$form" = more ] && echo _more)" "$task") || return 1
  arguments=(-c "$file")
  case " $LATENT " in
    *" $sampler "*) arguments+=(-c configs/prior/faces64_latent.yaml) ;;
    *) [[ "$sampler" == measurement_baseline || "$sampler" == linear_mmse ]] || arguments+=(-c configs/prior/faces64.yaml) ;;
  esac
  arguments+=(-c "configs/task/faces64/$task.yaml")
  if [[ "$form" == equi* ]]; then file=$(equi_file "$form" "$sampler" "$task") || return 1; arguments+=(-c "$file"); fi
}

keep() {  # FILE COPY: what was made, unless the copy is of more samples
  [ -f "$1" ] || return 0
  if [ -f "$2" ] && [ "$(wc -l < "$1")" -lt "$(wc -l < "$2")" ]; then
    echo "$2 has more lines than $1 and stays as it is" >&2
  else
    install -D -m 644 "$1" "$2"
  fi
}

what=${1:-help}
case $what in
  tune)
    experiment base "$2" "$3"
    $PYTHON cli.py sweep --name "tuning/$2_$3_${4##*.}" "${val[@]}" "${arguments[@]}" "${common[@]}" --over "$4=$5"
    keep "$ROOT/tuning/$2_$3_${4##*.}/sweep.md" "docs/tuning_faces64/$2_$3_${4##*.}.md" ;;
  tune_lambda)
    experiment "$2" "$3" "$4"
    values=$5; [[ "$values" == *=* ]] || values="trainer.callbacks.weight=0,$5"
    $PYTHON cli.py sweep --name "tuning/$2_$3_$4" "${val[@]}" "${arguments[@]}" "${common[@]}" --over "$values"
    keep "$ROOT/tuning/$2_$3_$4/sweep.md" "docs/tuning_faces64/$2_$3_$4.md" ;;
  row)
    form=$2 sampler=$3; shift 3
    for task in ${*:-$TASKS}; do
      experiment "$form" "$sampler" "$task" || { echo "$form $sampler: no configuration for $task"; continue; }
      $PYTHON cli.py predict -c configs/data/faces64.yaml "${arguments[@]}" "${common[@]}" --data.limit="$COUNT" \
        --name="$task/$form/$sampler"
      keep "$ROOT/$task/$form/$sampler/metrics.csv" "$RESULTS/$task/$form/$sampler/metrics.csv"
    done ;;
  tables)
    mkdir -p docs/equi_faces64
    table() {  # OUTPUT TITLE FORM/SAMPLER...: one block per task
      local output=$1 title=$2 runs=() names=() groups=() present; shift 2
      for task in $TASKS $NONLINEAR; do
        present=
        for row in "$@"; do
          [ -f "$RESULTS/$task/$row/metrics.csv" ] || continue
          runs+=("$RESULTS/$task/$row") present=yes
          case $row in base/*) names+=("${row#*/}") ;; *) names+=("${row%%/*} ${row#*/}") ;; esac
        done
        [ -n "$present" ] && groups+=("${task//_/ }")
      done
      [ ${#runs[@]} -gt 1 ] || return 0
      $PYTHON cli.py compare "${runs[@]}" --names "${names[@]}" --group --group-names "${groups[@]}" \
        --metrics psnr ssim data_misfit seconds network_evaluations network_backwards --title "$title" --output "$output"
    }
    bars=(base/measurement_baseline base/linear_mmse)
    table docs/table_faces64 "64x64 faces, every sampler" "${bars[@]}" $(printf 'base/%s ' $PIXEL $LATENT)
    for sampler in $LATENT $PIXEL; do  # each against its base, the reference of the differences
      table "docs/equi_faces64/$sampler" "64x64 faces, EquiReg in $sampler" base/$sampler more/$sampler equi/$sampler equicon/$sampler
    done ;;
  *) sed -n '2,/^set/p' "$0" | sed '$d'; exit 2 ;;
esac
