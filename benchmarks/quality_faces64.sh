#!/usr/bin/env bash
# The quality tables of docs/quality_faces64.md: search on val faces, then the table on test faces.
#
#   bash benchmarks/quality_faces64.sh tune_zeta  TASK STEPS "0.5,1,2"   DPS step sizes, val
#   bash benchmarks/quality_faces64.sh tune_lambda TASK STEPS "0.3,1,3"  EquiReg weights at the chosen step size, val
#   bash benchmarks/quality_faces64.sh rows TASK STEPS MORE COUNT        the five rows on COUNT test faces (MORE: steps at
#                                                                        the cost of Equi-DPS); ONLY="dps equi_dps" some
#   bash benchmarks/quality_faces64.sh price TASK                        EquiReg at every step, every 5th, every 10th, val
#   bash benchmarks/quality_faces64.sh tables                            docs/quality_faces64_STEPS.md (tables - 250: of that number of
#                                                                        steps), docs/price_faces64.md, docs/tuning_faces64/
#
# TASK is super_resolution, gaussian_deblur, motion_deblur, random_inpainting or box_inpainting. Runs are resumable.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
ROOT=${ROOT:-runs/quality_faces64}
TASKS="super_resolution gaussian_deblur motion_deblur random_inpainting box_inpainting"
what=${1:-help} task=${2:-} steps=${3:-100}

searched=${COUNT:-16}  # val faces of a search, spread over the split: neighbours in it are pictures of one person
val=(-c configs/data/faces64_val.yaml "--data.indices=[$(seq -s, 0 $((935 / searched)) $((935 / searched * (searched - 1))))]")
test=(-c configs/data/faces64.yaml)
common=(--data.batch_size=16 --trainer.devices=1 --trainer.precision=bf16-mixed --root="$ROOT")
suffix=$([ "$steps" = 100 ] && echo "" || echo "_$steps")
dps() { echo "configs/sampler/faces64/dps_$task$1.yaml"; }
prior=configs/prior/faces64.yaml
operator=configs/task/faces64/$task.yaml
measure=configs/equireg/faces64/measure.yaml
equi=configs/equireg/faces64/dps_$task$suffix.yaml

case $what in
  tune_zeta)
    $PYTHON cli.py sweep --name "zeta/${task}_$steps" "${val[@]}" -c "$(dps "")" -c $prior -c "$operator" "${common[@]}" \
      --model.num_steps="$steps" --over "model.zeta=$4" ;;
  tune_lambda)
    $PYTHON cli.py sweep --name "lambda/${task}_$steps" "${val[@]}" -c "$(dps "$suffix")" -c $prior -c "$operator" -c "$equi" \
      "${common[@]}" --over "trainer.callbacks.weight=0,$4" ;;
  price)
    cost() { name=$1; shift
      $PYTHON cli.py predict "${val[@]}" -c "$(dps "")" -c $prior -c "$operator" "$@" "${common[@]}" --name="price/$task/$name"
    }
    cost dps -c $measure
    for every in 1 5 10; do cost "every_$every" -c "$equi" --trainer.callbacks.every=$every; done ;;
  rows)
    more=$4 count=$5
    row() { name=$1; shift; [[ " ${ONLY:-$name} " == *" $name "* ]] || return 0
      $PYTHON cli.py predict "${test[@]}" "$@" "${common[@]}" --data.limit="$count" --name="$task/${steps}_$name"
    }
    if [ "$steps" = 100 ]; then
      row baseline -c configs/sampler/measurement_baseline.yaml -c "$operator" -c $measure
      row linear_mmse -c configs/sampler/linear_mmse.yaml -c "$operator" -c $measure
    fi
    row dps -c "$(dps "$suffix")" -c $prior -c "$operator" -c $measure
    row equi_dps -c "$(dps "$suffix")" -c $prior -c "$operator" -c "$equi"
    row dps_more -c "$(dps "_$more")" -c $prior -c "$operator" -c $measure ;;
  tables)
    mkdir -p docs/tuning_faces64
    for kind in zeta lambda; do
      for folder in "$ROOT/$kind"/*/; do
        [ -f "$folder/sweep.md" ] && cp "$folder/sweep.md" "docs/tuning_faces64/${kind}_$(basename "$folder").md"
      done
    done
    runs=() names=() groups=()
    for task in $TASKS; do
      [ -f "$ROOT/price/$task/every_10/metrics.csv" ] || continue
      for name in dps every_1 every_5 every_10; do runs+=("$ROOT/price/$task/$name") names+=("$name"); done
      groups+=("${task//_/ }")
    done
    [ ${#runs[@]} = 0 ] || $PYTHON cli.py compare "${runs[@]}" --names "${names[@]}" --group --group-names "${groups[@]}" \
      --metrics psnr ssim equivariance_error seconds --title "64x64 faces, EquiReg at every step, every 5th, every 10th" \
      --output docs/price_faces64
    runs=() names=() groups=()
    for task in $TASKS; do
      for name in dps baseline linear_mmse dps_more equi_dps; do
        path=$ROOT/$task/${steps}_$name
        case $name in baseline | linear_mmse) path=$ROOT/$task/100_$name ;; esac  # these take no steps
        [ -f "$ROOT/$task/${steps}_dps/metrics.csv" ] && [ -f "$path/metrics.csv" ] || continue
        runs+=("$path") names+=("$name")
      done
      [ ! -f "$ROOT/$task/${steps}_dps/metrics.csv" ] || groups+=("${task//_/ }")
    done
    $PYTHON cli.py compare "${runs[@]}" --names "${names[@]}" --group --group-names "${groups[@]}" \
      --metrics psnr ssim data_misfit equivariance_error seconds --title "64x64 faces, $steps steps" \
      --output "docs/quality_faces64_$steps" ;;
  *) sed -n 2,12p "$0"; exit 2 ;;
esac
