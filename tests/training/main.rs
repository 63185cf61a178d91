//! `uniarm train` as a user runs it: killed, short of room, divided among processes, over a model of two small layers.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

mod scene;

use std::{path::Path, time::Duration};

use scene::Scene;
use uniarm_model::OpenOptions;
use uniarm_tls::{Identity, RoleName, testing::Authority};
use uniarm_trainer::pairs::{
    self, OnBadLine,
    tokens::{PairReader, Ties},
};

/// Where ten kills fall within the run, and some milliseconds more: anywhere in a step, an evaluation or a checkpoint.
fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *seed >> 33
}

fn assert_same_run(undisturbed: &Path, other: &Path) {
    for name in ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "metrics.jsonl"] {
        let read = |folder: &Path| std::fs::read(folder.join(name)).unwrap();
        assert!(read(undisturbed) == read(other), "{name} differs from that of the undisturbed run");
    }
}

#[test]
fn a_run_killed_at_ten_random_points_ends_byte_identical() {
    let scene = Scene::new();
    let undisturbed = scene.finish("undisturbed", &[]);
    let lines = scene::lines(&undisturbed.join("metrics.jsonl"));
    let mut seed = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    println!("seed {seed}");
    let folder = scene.path("killed");
    for kill in 0..10 {
        let mut run = scene.start("killed", &["--resume"]);
        let target = 1 + kill * (lines - 2) / 10 + random(&mut seed) as usize % 2;
        while run.try_wait().unwrap().is_none() && scene::lines(&folder.join("metrics.jsonl")) < target {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(random(&mut seed) % 12));
        run.kill().unwrap();
        run.wait().unwrap();
    }
    scene.finish("killed", &["--resume"]);
    assert_same_run(&undisturbed, &folder);
}

#[test]
fn an_answer_that_was_cut_off_has_no_end_of_turn() {
    let scene = Scene::new();
    let line = r#"{"prompt":"x","response_a":"aa","response_b":"bb","finished":{"a":true,"b":false},"preferred":{}}"#;
    std::fs::write(scene.path("cut.jsonl"), line).unwrap();
    let mut read = pairs::read(&[scene.path("cut.jsonl")], &[], &[], OnBadLine::Fail).unwrap();
    let files = uniarm_model::open(scene.path("model").to_str().unwrap(), &OpenOptions::default()).unwrap();
    let reader = PairReader {
        tokenizer: files.tokenizer.as_ref().unwrap(),
        template: files.template.as_ref().unwrap(),
        system: None,
        max_prompt_tokens: 100,
        max_tokens: 200,
    };
    let end = reader.end_of_turn().unwrap();
    let tokens = reader.read(&mut read, &[], Ties::Neutral).unwrap();
    assert_eq!(tokens[0].answers.each_ref().map(Vec::len), [3, 2]);
    assert_eq!(tokens[0].answers.each_ref().map(|answer| answer.ends_with(&[end])), [true, false]);
}

#[test]
fn a_disk_without_room_costs_no_checkpoint() {
    let scene = Scene::new();
    let undisturbed = scene.finish("undisturbed", &[]);
    let folder = scene.path("full");
    let mut run = scene.start("full", &[]);
    while scene::checkpoints(&folder).is_empty() {
        assert!(run.try_wait().unwrap().is_none(), "ended without a checkpoint");
        std::thread::sleep(Duration::from_millis(1));
    }
    run.kill().unwrap();
    run.wait().unwrap();
    // A limit of the system on the size of files stands for the disk: a checkpoint is larger, everything else smaller.
    let before = scene::checkpoints(&folder);
    let checkpoint = std::fs::metadata(folder.join(&before[0])).unwrap().len();
    let error = scene.fail_with_limit("full", checkpoint * 6 / 10);
    assert!(error.contains("no checkpoint could be written, the last good one is"), "{error}");
    assert!(error.contains("--resume") && error.contains("File too large"), "{error}");
    assert_eq!(scene::checkpoints(&folder), before);
    scene.finish("full", &["--resume"]);
    assert_same_run(&undisturbed, &folder);
}

#[test]
fn two_workers_train_what_one_does() {
    let scene = Scene::new();
    let one = scene.finish("one", &[]);
    let two = scene.finish("two", &["--workers", "2"]);
    let (one, two) = (scene::weights(&one), scene::weights(&two));
    let farthest = one.iter().zip(&two).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let largest = one.iter().fold(0.0_f32, |largest, weight| largest.max(weight.abs()));
    assert_eq!(one.len(), two.len());
    assert!(farthest < 1e-3 * largest, "{farthest} apart, the largest weight is {largest}");
}

#[test]
fn workers_show_each_other_certificates_and_train_the_same_bytes() {
    let scene = Scene::new();
    let authority = Authority::new(&scene.path(""), "run");
    let flags = |name: &str, role: RoleName| {
        let Identity { authority, certificate, key } = authority.issue(name, &[role.dns()]);
        let files = [("--tls-ca", authority), ("--tls-cert", certificate), ("--tls-key", key)];
        files.map(|(flag, file)| format!("{flag}={}", file.display()))
    };
    let [trainer, base] = [flags("trainer", RoleName::Trainer), flags("base", RoleName::Base)];
    fn with<'a>(more: &[&'a str], tls: &'a [String; 3]) -> Vec<&'a str> {
        more.iter().copied().chain(tls.iter().map(String::as_str)).collect()
    }
    let plain = scene.finish("plain", &["--workers", "2"]);
    let secured = scene.finish("secured", &with(&["--workers", "2"], &trainer));
    assert_same_run(&plain, &secured);

    // A base worker's certificate says nothing here: to workers that are started together, and to one that comes by itself.
    let said = scene.fail("strangers", &with(&["--workers", "2"], &base));
    assert!(said.contains("worker 1 ended before all had met"), "{said}");
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let rank = |number| ["--rank", number, "--size", "2", "--rendezvous", &address];
    let mut first = scene.start("first", &with(&rank("0"), &trainer));
    let said = scene.fail("stranger", &with(&rank("1"), &base));
    assert!(said.contains("rank 0 takes this one for none of the group's"), "{said}");
    first.kill().unwrap();
    first.wait().unwrap();
}

#[test]
fn a_run_that_changed_is_refused_and_says_what_changed() {
    let scene = Scene::new();
    scene.finish("run", &[]);
    let error = scene.fail("run", &[]);
    assert!(error.contains("already holds a run: continue it with --resume"), "{error}");
    let error = scene.fail("run", &["--resume", "--learning-rate", "0.5"]);
    assert!(error.contains("optimizer.learning_rate was 0.02 and is 0.5"), "{error}");
    scene.add_pair(r#"{"prompt":"one more","response_a":"x","response_b":"y","scores":{"short":{"a":1,"b":0},"nice":{"a":1,"b":0}}}"#);
    let error = scene.fail("run", &["--resume"]);
    assert!(error.contains("the pairs changed"), "{error}");
    scene
        .add_pair(r#"{"prompt":"bad","response_a":"x","response_b":"y","scores":{"short":{"a":NaN,"b":0}}}"#);
    let error = scene.fail("run", &["--resume"]);
    assert!(error.contains("pairs.jsonl:34: scores.short.a: not a finite number [not_finite]"), "{error}");
}
