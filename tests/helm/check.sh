#!/bin/sh
# The chart: lints, renders to what Kubernetes accepts, agrees with itself and with the binary, refuses in sentences, and goes
# into a real API server where there is one.
# Usage: tests/helm/check.sh [UNIARM]      UNIARM: the binary that the pods' command lines are tried with
set -u
cd "$(dirname "$0")/../.." || exit 1

KUBERNETES="1.30 1.31 1.32 1.33 1.34 1.35"
uniarm=${1:-${CARGO_TARGET_DIR:-target}/release/uniarm}
chart=helm/uniarm

if ! { helm=$(scripts/k8s-tools.sh helm) && python=$(scripts/k8s-tools.sh python); }; then
    echo "skipped: the chart, because its tools cannot be had (see above)"
    exit 0
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
passed=0 failed=0

# check WHAT COMMAND...: what the command prints is shown only when it fails.
check() {
    what=$1
    shift
    if "$@" >"$scratch/output" 2>&1; then
        passed=$((passed + 1)) && echo "ok      chart: $what"
    else
        failed=$((failed + 1)) && echo "FAILED  chart: $what" && sed 's/^/        /' "$scratch/output"
    fi
}

without_resources='import sys, yaml
manifests = filter(None, yaml.safe_load_all(open(sys.argv[1])))
yaml.safe_dump_all((m for m in manifests if m["kind"] not in ("Certificate", "ScaledObject", "GRPCRoute", "HTTPRoute")), sys.stdout)'

render() { "$helm" template trial "$chart" --namespace steering "$@"; }
valid() { "$python" -m kubernetes_validate --strict -k "$1" "$2"; }

# refuses SENTENCE ARGUMENT...: the values are not rendered, and the reason is given in these words.
refuses() {
    sentence=$1
    shift
    if render "$@" >/dev/null 2>"$scratch/reason"; then
        echo "it was rendered" && return 1
    fi
    grep -qF -- "$sentence" "$scratch/reason" || { cat "$scratch/reason" && return 1; }
}

for values in $chart/values*.yaml tests/helm/values/*.yaml; do
    name=$(basename "$values" .yaml)
    manifests=$scratch/$name.yaml
    check "$name: lint" "$helm" lint --strict --quiet "$chart" --values "$values"
    render --values "$values" >"$manifests" 2>"$scratch/error"
    check "$name: renders" test ! -s "$scratch/error"
    # Kubernetes by itself knows no Certificate, no ScaledObject and no routes: relations.py looks at those.
    "$python" -c "$without_resources" "$manifests" >"$scratch/own.yaml"
    for version in $KUBERNETES; do
        check "$name: valid for Kubernetes $version" valid "$version" "$scratch/own.yaml"
    done
    check "$name: names refer to what exists" "$python" tests/helm/relations.py "$manifests"
    if [ -x "$uniarm" ]; then
        check "$name: the binary takes the pods' command lines" "$python" tests/deploy/command_lines.py "$uniarm" pods "$manifests"
    else
        echo "skipped: $name: the pods' command lines, because $uniarm is not built"
    fi
done
long() {
    "$helm" template a-release-whose-name-is-as-long-as-helm-lets-it-be-53 "$chart" --namespace steering \
        --set base.shards=2,reward.shards=2 >"$scratch/long.yaml" && "$python" tests/helm/relations.py "$scratch/long.yaml"
}
check "the longest of release names has groups too" long
check "texts arrive as they were written" "$python" tests/helm/texts.py tests/helm/values/everything.yaml "$scratch/everything.yaml"
if [ -x "$uniarm" ]; then
    check "the simulator follows the chart's numbers" "$python" tests/helm/autoscaling.py "$uniarm" "$scratch/autoscaled-keda.yaml"
else
    echo "skipped: whether the simulator follows the chart's numbers, because $uniarm is not built"
fi
check "the schema is written in sentences" "$python" tests/helm/sentences.py "$chart"

check "refuses two stores" refuses "set etcd.enabled to false, or leave store.endpoints empty" \
    --set 'store.endpoints={etcd:2379}'
check "refuses no store" refuses "name one in store.endpoints, or set etcd.enabled to true" \
    --set etcd.enabled=false
check "refuses three etcds that forget" refuses "a member that loses its data cannot rejoin" \
    --set etcd.replicas=3 --set etcd.storage=
check "refuses KEDA without a Prometheus" refuses "set autoscaling.prometheus.address" --set autoscaling.by=keda
check "refuses more pods at least than at most" refuses "autoscaling.base.minReplicas is 11, and maxReplicas is 10" \
    --set autoscaling.by=hpa --set autoscaling.base.minReplicas=11
check "refuses a pool that nothing would scale" refuses "autoscaling.base has no target, and nothing would scale it" \
    --set autoscaling.by=hpa --set autoscaling.base.sequences=null --set autoscaling.base.blocks=null
check "refuses routers without a CPU to take a share of" refuses "router.resources.requests.cpu is not set" \
    --set autoscaling.by=hpa --set router.resources.requests.cpu=null
check "refuses to drain for longer than a pool may take to shrink" refuses "drainTimeoutSeconds is 1800: a pool shrinks by one pod" \
    --set autoscaling.by=hpa --set drainTimeoutSeconds=1800
check "refuses to scale pools to nothing" refuses "minReplicas': minimum: got 0, want 1" --set autoscaling.reward.minReplicas=0
check "refuses another autoscaler" refuses "at '/autoscaling/by': value must be one of '', 'hpa', 'keda'" \
    --set autoscaling.by=vpa
for pool in base reward; do
    check "refuses to scale groups of pods that are $pool workers" refuses "set autoscaling.$pool.enabled to false and scale by $pool.replicas" \
        --set autoscaling.by=hpa --set $pool.shards=2
done
check "refuses more ranks than a group may have" refuses "at '/base/shards': maximum: got 65, want 64" --set base.shards=65
check "refuses stages that do not divide the pods of a group" refuses "set base.shards to a multiple of 2" \
    --set base.shards=3,base.stages=2
check "refuses a rank of one's own choice" refuses "at '/base/env/0/name'" --set 'base.env[0].name=RANK,base.env[0].value=0'
check "refuses hosts of no Gateway" refuses "router.gateway.grpc.hostnames lists a.example.com, and router.gateway.grpc.parentRefs is empty" \
    --set 'router.gateway.grpc.hostnames={a.example.com}'
check "refuses a route to HTTP that is not there" refuses "router.http.enabled is false: there is no HTTP to lead to" \
    --set 'router.gateway.http.parentRefs[0].name=public' --set router.http.enabled=false
check "refuses a Gateway before routers that ask for certificates" refuses "let the Gateway ask" \
    --set 'router.gateway.grpc.parentRefs[0].name=public' --set router.front.tlsSecret=front --set router.front.clientCaSecret.name=partners
routes() {
    printf 'router: {gateway: {grpc: {parentRefs: [%s], hostnames: [%s]}, http: {parentRefs: [%s], hostnames: [%s]}}}' "$@" >"$scratch/routes.yaml"
}
one_host() { routes "$@" && refuses "which takes one kind of route for a host" --values "$scratch/routes.yaml"; }
two_hosts() { routes "$@" && render --values "$scratch/routes.yaml"; }
check "refuses two routes for any host" one_host '{name: public}' '' '{name: public, namespace: steering}' a.example.com
check "refuses two routes for one host" one_host '{name: public}' 'b.example.com, a.example.com' '{name: public, port: 443}' a.example.com
check "refuses a route within the other's hosts" one_host '{name: public}' a.b.example.com '{name: public}' "'*.example.com'"
check "takes a host and those below it" two_hosts '{name: public}' example.com '{name: public}' "'*.example.com'"
check "takes one host at two listeners" two_hosts '{name: public, port: 443}' a.example.com '{name: public, port: 8443}' a.example.com
check "takes one host of two Gateways" two_hosts '{name: public}' '' '{name: public, namespace: gateways}' ''
check "refuses certificates at the admin ports where there are none" refuses "set tls.enabled to true, or tls.admin to false" --set tls.admin=true
check "refuses a user without a password" refuses "store.user is steering, and store.passwordSecret.name is empty" \
    --set etcd.enabled=false --set 'store.endpoints={etcd:2379}' --set store.user=steering
check "refuses a secret for an etcd that has none" refuses "store.tlsSecret and store.user are for an etcd of your own" \
    --set store.tlsSecret=etcd-client
check "refuses one port for two protocols" refuses "gRPC and HTTP need a port each" \
    --set router.http.port=7000
check "refuses two etcds" refuses "at '/etcd/replicas': value must be one of 1, 3, 5" \
    --set etcd.replicas=2
check "refuses a model on no volume" refuses "base.model is /models/llama, but modelVolume is empty" \
    --set base.model=/models/llama
check "refuses an adapter on no volume" refuses "reward.adapters lists /models/harmless, but modelVolume is empty" \
    --set 'reward.adapters={/models/harmless}'
check "refuses clients with certificates and no TLS" refuses "without TLS nobody can show one" \
    --set router.front.clientCaSecret.name=partners
check "refuses an issuer beside a secret" refuses "set tls.enabled to true, and leave tls.secret empty" \
    --set tls.enabled=true --set tls.secret=mine --set tls.issuerRef.name=ca
check "refuses an issuer for nothing" refuses "set tls.enabled to true, and leave tls.secret empty" \
    --set tls.issuerRef.name=ca
check "refuses a batch without a key" refuses "name its secret in client.apiKeySecret" \
    --set router.front.tenants.name=tenants --set batch.enabled=true --set 'batch.volume.emptyDir.sizeLimit=1Gi'
check "refuses a batch without a volume" refuses "batch.enabled is true, and batch.volume is empty" \
    --set batch.enabled=true
check "refuses answers outside the volume" refuses "at '/batch/output': 'out.jsonl' does not match pattern" \
    --set batch.output=out.jsonl
check "refuses an objective named twice" refuses "reward.prompted names kind twice" \
    --set 'reward.prompted[0].name=kind,reward.prompted[0].text=a,reward.prompted[1].name=kind,reward.prompted[1].text=b'
check "refuses an unknown exchange" refuses "at '/base/exchange': value must be one of 'certified', 'dense'" \
    --set base.exchange=sparse
check "refuses a misspelt value" refuses "additional properties 'replica' not allowed" \
    --set router.replica=2
check "refuses a model that is no model" refuses "Is hf://meta-llama/Llama-2-7b-hf meant?" \
    --set base.model=meta-llama/Llama-2-7b-hf
check "refuses an old Kubernetes" refuses "requires kubeVersion: >=1.30.0-0" \
    --kube-version 1.29.0

# It counts for itself.
tests/helm/apiserver.sh "$uniarm" || failed=$((failed + 1))

echo "chart: $passed passed, $failed failed"
[ "$failed" = 0 ]
