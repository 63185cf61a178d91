//! Workers whose models compute on a GPU. None is here: a libcuda of crates/cuda's tests runs the same kernels on the CPU.

use std::process::{Command, Stdio};

use crate::harness::{
    Host, Running, ask_all, demo_model, free_address, knows_its_workers, machine, repository, request, worker,
};

/// Exit status of the script where there is no compiler.
const NO_COMPILER: i32 = 3;

/// A machine that takes itself for one with a GPU. `None`: it cannot be had here.
fn machine_with_gpu(libraries: &std::path::Path) -> Option<Host> {
    let script = repository().join("crates/cuda/tests/fake/build.sh");
    let output = Command::new("sh").arg(script).arg(libraries).output().unwrap();
    if output.status.code() == Some(NO_COMPILER) {
        println!("skipped: {}", String::from_utf8_lossy(&output.stderr).trim());
        return None;
    }
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(Host::with_libraries(libraries))
}

#[tokio::test(flavor = "multi_thread")]
async fn base_and_reward_workers_on_a_gpu_answer_as_those_on_the_cpu() {
    let _machine = machine();
    let folder = tempfile::tempdir().unwrap();
    let Some(host) = machine_with_gpu(folder.path()) else { return };
    let adapter = format!("shipped={}", repository().join("adapters/positive-concise").display());
    // The CPU that stands in takes seconds for a token: a short prompt, and few of them.
    let mut asked = request("Hi!", &[("positive", 0.7), ("concise", 0.3)]);
    asked.sampling.temperature = 0.0;
    asked.sampling.max_tokens = 3;
    let mut sampled = asked.clone();
    sampled.sampling.temperature = 1.0;
    let requests = [asked, sampled];
    let answers = async |base: &Running, reward: &Running| {
        let router =
            Running::start("router", &["--base-peer", &base.address, "--reward-peer", &reward.address]);
        let inference = knows_its_workers(&router.address).await;
        let answers = ask_all(&inference, &requests, 2).await;
        answers.into_iter().map(|answer| answer.choices[0].tokens.clone()).collect::<Vec<_>>()
    };
    let flags = ["--model", demo_model(), "--kv-tokens", "512", "--device", "cuda", "--gpu-weights", "f32"];
    // In lock-step, where reward workers hand over lists too. A group has no lane: all goes by gRPC.
    let flags_of_base = [&flags[..], &["--draft-window", "0", "--dense-over", "nccl"]].concat();
    let base = Running::start_on(&host, "base", &flags_of_base);
    // A group of one: it meets, agrees and computes as larger ones do, whose ranks the stand-in for NCCL has as threads only.
    let meeting = free_address();
    let group = ["--group", "g0", "--rank", "0", "--size", "1", "--group-address", &meeting];
    let flags_of_reward = [&flags[..], &["--adapter", &adapter], &group].concat();
    let reward = Running::start_on(&host, "reward", &flags_of_reward);
    let found = answers(&base, &reward).await;
    // Both rankings of them: with noise, and without.
    let lists = |worker: &Running, role: &str| {
        worker.metric(&format!("uniarm_{role}_positions_total{{form=\"list\"}}"))
    };
    let made = [lists(&base, "base"), lists(&reward, "reward")];
    assert!(made.iter().all(|lists| *lists >= 4.0), "{made:?} positions came as lists");
    drop((base, reward));
    let expected = answers(&worker("base", &[]), &worker("reward", &["--adapter", &adapter])).await;
    assert_eq!(found, expected);
    assert!(found.iter().all(|tokens| tokens.len() == 3), "{found:?}");
}

#[test]
fn ranks_on_a_cpu_and_on_a_gpu_refuse_each_other() {
    let _machine = machine();
    let folder = tempfile::tempdir().unwrap();
    let Some(host) = machine_with_gpu(folder.path()) else { return };
    let meeting = free_address();
    let start = |rank: &str, device: &str| {
        host.command(env!("CARGO_BIN_EXE_uniarm"))
            .args(["base", "--model", demo_model(), "--kv-tokens", "512", "--listen", "127.0.0.1:0"])
            .args(["--device", device, "--group", "g0", "--rank", rank, "--size", "2"])
            .args(["--group-address", &meeting, "--group-timeout", "120"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    for rank in [start("0", "cpu"), start("1", "cuda")] {
        let output = rank.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{said}");
        let sentence = "rank 1 computes on a GPU with weights of bf16, and rank 0 on a CPU";
        assert!(said.contains(sentence), "{said}");
    }
}

#[test]
fn doctor_sees_the_device_compiles_kernels_for_it_and_times_them() {
    let folder = tempfile::tempdir().unwrap();
    let Some(host) = machine_with_gpu(folder.path()) else { return };
    let output = host.command(env!("CARGO_BIN_EXE_uniarm")).args(["doctor", "--json"]).output().unwrap();
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let found = |what: &str| {
        let found = said["findings"].as_array().unwrap().iter().find(|finding| finding["what"] == what);
        found.unwrap_or_else(|| panic!("nothing is said of {what}: {said}"))
    };
    for (what, rates) in [("cuda:0", 0), ("kernels", 0), ("cuda:0 products", 2), ("cuda:0 copies", 3)] {
        let found = found(what);
        assert_eq!(found["state"], "ok", "{found}");
        let detail = found["detail"].as_str().unwrap();
        let words: Vec<&str> = detail.split([' ', ',', ';']).collect();
        let with_unit = words.windows(2).filter(|pair| ["GB/s", "TFLOP/s"].contains(&pair[1]));
        let measured: Vec<f64> = with_unit.map(|pair| pair[0].parse().unwrap()).collect();
        assert_eq!(measured.len(), rates, "{detail}");
        assert!(measured.iter().all(|rate| *rate > 0.0 && rate.is_finite()), "{detail}");
    }
}

#[test]
fn a_gpu_that_cannot_be_is_refused_with_a_sentence() {
    let refused = |flags: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_uniarm"))
            .args(["base", "--model", demo_model()])
            .args(flags)
            .output()
            .unwrap();
        assert!(!output.status.success(), "{flags:?} started");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let meeting = free_address();
    let group = ["--group", "g0", "--rank", "0", "--size", "2", "--group-address", &meeting];
    let on_cpu = refused(&["--dense-over", "nccl"]);
    assert!(on_cpu.contains("--dense-over nccl goes with --device cuda"), "{on_cpu}");
    let grouped = refused(&[&["--device", "cuda", "--dense-over", "nccl"][..], &group].concat());
    assert!(grouped.contains("--dense-over nccl goes with neither --group nor --fused-reward"), "{grouped}");
    let unknown = refused(&["--device", "gpu"]);
    assert!(unknown.contains("cpu, cuda, or cuda:N"), "{unknown}");
    if std::path::Path::new("/proc/driver/nvidia").exists() {
        println!("skipped: what is said without a GPU, because this machine has one");
        return;
    }
    let absent = refused(&["--device", "cuda"]);
    assert!(absent.contains("no NVIDIA driver (libcuda.so.1) on this machine"), "{absent}");
    assert!(absent.contains("on --device cuda:0"), "{absent}");
}
