#!/usr/bin/env bash
# The tables of docs/table_pde.md, Table 4 at small scale: search on val fields, the rows on test fields, the tables.
#
#   bash benchmarks/table_pde.sh tune_weight PDE TASK STEPS "1,2,4"                FunDPS: c of weight = c sensors
#   bash benchmarks/table_pde.sh tune_sigma_max PDE TASK STEPS "3,10,80"           FunDPS: the noise level it starts from
#   bash benchmarks/table_pde.sh tune_diffusion_pde PDE TASK STEPS "10,30,100"     DiffusionPDE: zeta of what is observed
#   bash benchmarks/table_pde.sh tune_ridge PDE TASK STEPS "0.001,0.01"            FieldPiGDM
#   bash benchmarks/table_pde.sh tune_lambda PDE TASK STEPS GROUP "0,0.1,0.3,1"    Equi-FunDPS: rho of lambda = rho weight
#   bash benchmarks/table_pde.sh rows PDE TASK STEPS MORE COUNT                    on COUNT test fields; ONLY="..." some
#   bash benchmarks/table_pde.sh tables                                            docs/table_pde_*.md of all rows so far
#
# PDE is helmholtz or navier_stokes, TASK forward, inverse or inverse_12percent, GROUP exact or flip; MORE are the steps
# of FunDPS that take as long as 100 of Equi-FunDPS. What is chosen goes into configs/sampler/PDE64 and
# configs/equireg/PDE64 by hand, one file per setting. Further arguments of a tune verb are handed to `cli.py sweep`:
# `--model.weight=1000` searches lambda at another weight than that of FunDPS, which is still the unit of rho. Runs are
# resumable: name the values already searched with the new ones.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
ROOT=${ROOT:-runs/table_pde}
RESULTS=benchmarks/results/fields64 # the metrics of finished rows are kept there: tables, and comparisons with your own
DATA=${DATA:-data/pde}              # what is not there is generated as for the trainings
PRECISION=${PRECISION:-bf16-mixed}  # of the networks of priors alone: samplers are float64, FNOs float32
BATCH=${BATCH:-16}
SEARCHED=${SEARCHED:-32}            # val fields of a search, spread over the split, each with its own sensors and seed
# glibc returns arrays of tens of megabytes to the system after every operation: the FNO took twice as long at batch 32
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4000000000}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-8000000000}

fail() { echo "$1" >&2; exit 2; }
what=${1:-help} pde=${2:-} task=${3:-} steps=${4:-}
if [[ $what == tune_* || $what == rows ]]; then
  [[ " helmholtz navier_stokes " == *" $pde "* ]] || fail "PDE must be helmholtz or navier_stokes, not '$pde'"
  [[ " forward inverse inverse_12percent " == *" $task "* ]] || fail "TASK '$task' is unknown"
fi
direction=${task%_12percent}
sensors=$([ "$task" = inverse_12percent ] && echo 492 || echo 125)
completion=linear_mmse_$([ "$direction" = inverse ] && echo fno || echo solver)
suffix=$([ "$steps" = 100 ] && echo "" || echo "_$steps")

data=(-c "configs/data/${pde}64.yaml" --data.folder="$DATA")
pairs=$([ "$pde" = navier_stokes ] && echo 4000 || echo 8000)  # those of configs/train
data+=(--data.generate_train="$pairs" --data.generate_val=200 --data.generate_test=200)
val=("${data[@]}" --data.predict_split=val --data.limit="$SEARCHED" --data.subset_seed=0)
common=(--data.batch_size="$BATCH" --trainer.devices=1 --trainer.precision="$PRECISION" --root="$ROOT")
problem=(-c "configs/prior/${pde}64.yaml" -c "configs/task/fields64/$task.yaml")
samplers=configs/sampler/${pde}64
equireg=configs/equireg/${pde}64

of_100=$samplers/fundps_$task.yaml
fundps=$samplers/fundps_$task$suffix.yaml
placed=${fundps%.yaml}_placed.yaml
beside() { # FUNDPS GROUP: FunDPS at the weight that it has beside the penalty, where that is another one
  [ -f "${1%.yaml}_$2.yaml" ] && echo "${1%.yaml}_$2.yaml" || echo "$1"
}
equi() { echo "$equireg/fundps_$task$suffix$([ "$1" = exact ] && echo "" || echo "_$1").yaml"; } # GROUP
scaled() { # FACTOR "1,2,4"
  awk -v factor="$1" -v list="$2" 'BEGIN {
    n = split(list, v, ",")
    for (i = 1; i <= n; i++) printf("%s%g", (i > 1) ? "," : "", factor * v[i])
  }'
}
keep() { # FILE COPY: what was made, unless the copy is of more samples
  [ -f "$1" ] || return 0
  if [ -f "$2" ] && [ "$(wc -l < "$1")" -lt "$(wc -l < "$2")" ]; then
    echo "$2 has more lines than $1 and stays as it is" >&2
  else
    install -D -m 644 "$1" "$2"
  fi
}
sweep() { # KIND FOLDER OPTION...: the best setting is that of the least relative L2
  local name=${pde}_${task}_$2
  $PYTHON cli.py sweep --name "$1/$name" --metric relative_l2 "${val[@]}" "${@:3}" "${common[@]}"
  keep "$ROOT/$1/$name/sweep.md" "docs/tuning_pde/$1_$name.md"
}

case $what in
  tune_weight)
    weights=$(scaled "$sensors" "$5")
    sweep weight "$steps" -c "$of_100" "${problem[@]}" --model.num_steps="$steps" \
      --over "model.weight=$weights" "${@:6}" ;;
  tune_sigma_max)
    sweep sigma_max "$steps" -c "$fundps" "${problem[@]}" --over "model.sigma_max=$5" "${@:6}" ;;
  tune_diffusion_pde)
    zeta=$([ "$direction" = inverse ] && echo zeta_u || echo zeta_a)
    sweep zeta "$steps" -c "$samplers/diffusion_pde_$direction.yaml" "${problem[@]}" --model.num_steps="$steps" \
      --over "model.$zeta=$5" "${@:6}" ;;
  tune_ridge)
    sweep ridge "$steps" -c "$samplers/field_pigdm.yaml" "${problem[@]}" --model.num_steps="$steps" \
      --over "model.ridge=$5" "${@:6}" ;;
  tune_lambda)
    weight=$(sed -n 's/^ *weight: *\([0-9.]*\).*/\1/p' "$fundps")
    lambdas=$(scaled "$weight" "$6")
    sweep lambda "${steps}_$5" -c "$fundps" "${problem[@]}" -c "$(equi "$5")" \
      --over "trainer.callbacks.weight=$lambdas" "${@:7}" ;;
  rows)
    more=$5 count=$6
    case ${task}_$steps in
      *_500) rows="fundps equi_fundps_exact" ;;
      *)
        rows="linear_mmse $completion diffusion_pde fundps equi_fundps_exact equi_fundps_flip fundps_t0 field_pigdm"
        if [ "$task" = "$direction" ]; then rows+=" fundps_more fundps_more_t0"; fi
        if [ -f "$placed" ]; then
          rows+=" fundps_placed equi_fundps_placed fundps_placed_t0 equi_fundps_placed_t0"
        fi ;;
    esac
    for name in ${ONLY:-$rows}; do
      sampler=${name%_t0}
      case $sampler in # every run names its sampler first, and a regulariser last: one of weight 0 measures
        linear_mmse) row=(-c configs/sampler/fields/linear_mmse.yaml -c "configs/task/fields64/$task.yaml") ;;
        linear_mmse_solver) row=(-c configs/sampler/fields/$name.yaml -c "configs/task/fields64/$task.yaml") ;;
        linear_mmse_fno) row=(-c "$samplers/$name.yaml" -c "configs/task/fields64/$task.yaml") ;;
        diffusion_pde) row=(-c "$samplers/${name}_$direction.yaml" "${problem[@]}" --model.num_steps="$steps") ;;
        fundps) row=(-c "$fundps" "${problem[@]}") ;;
        fundps_placed) row=(-c "$placed" "${problem[@]}") ;;
        fundps_more) row=(-c "$of_100" "${problem[@]}" --model.num_steps="$more") ;;
        equi_fundps_placed) row=(-c "$(beside "$placed" exact)" "${problem[@]}" -c "$(equi exact)") ;;
        equi_fundps_*)
          group=${sampler##*_}
          row=(-c "$(beside "$fundps" "$group")" "${problem[@]}" -c "$(equi "$group")") ;;
        field_pigdm) row=(-c "$samplers/$name.yaml" "${problem[@]}" --model.num_steps="$steps") ;;
        *) fail "row '$name' is unknown" ;;
      esac
      [[ $name != *_t0 ]] || row+=(--model.temperature=0)
      [[ $name == equi_* ]] || row+=(-c "$equireg/measure.yaml")
      $PYTHON cli.py predict "${data[@]}" "${row[@]}" "${common[@]}" --data.limit="$count" \
        --name="$pde/$task/${steps}_$name"
      keep "$ROOT/$pde/$task/${steps}_$name/metrics.csv" "$RESULTS/$pde/$task/${steps}_$name/metrics.csv"
    done ;;
  tables)
    others="linear_mmse linear_mmse_fno linear_mmse_solver diffusion_pde"
    others+=" fundps_more equi_fundps_exact equi_fundps_flip fundps_placed equi_fundps_placed"
    others+=" fundps_t0 fundps_more_t0 fundps_placed_t0 equi_fundps_placed_t0 field_pigdm"
    table() { # STEM TITLE STEPS TASKS REFERENCE OTHERS: a block per problem whose reference was run
      runs=() names=() blocks=()
      for pde in helmholtz navier_stokes; do
        for task in $4; do
          [ -f "$RESULTS/$pde/$task/$3_$5/metrics.csv" ] || continue
          blocks+=("${pde//_/ }, ${task//_/ }")
          for name in $5 $6; do
            [ -f "$RESULTS/$pde/$task/$3_$name/metrics.csv" ] || continue
            runs+=("$RESULTS/$pde/$task/$3_$name") names+=("$name")
          done
        done
      done
      [ ${#runs[@]} -gt 0 ] || return 0
      $PYTHON cli.py compare "${runs[@]}" --names "${names[@]}" --group --group-names "${blocks[@]}" \
        --metrics relative_l2 data_misfit network_evaluations --title "$2" --output "docs/table_pde_$1"
    }
    table 100 "Fields from 3 % sensors, 64x64, 100 steps" 100 "forward inverse" fundps "$others"
    table 500 "Fields from 3 % sensors, 64x64, 500 steps" 500 inverse fundps equi_fundps_exact
    table 12percent "Fields from 12 % sensors, 64x64, 100 steps" 100 inverse_12percent fundps "$others" ;;
  *) sed -n '2,/^set/p' "$0" | sed '$d'; exit 2 ;;
esac
