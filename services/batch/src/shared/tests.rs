//! Shared jobs through a real etcd, over a cluster that is a function of the request.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use std::{path::Path, time::Duration};

use uniarm_cluster::{EtcdOptions, Work, testing::EtcdServer};
use uniarm_proto::{GenerateRequest, Input};

use crate::{
    drive::DriveOptions,
    job::{JobError, JobOptions, Part, Progress, run, run_shared, tests::Function},
    output::Order,
    request::Plan,
    source::Source,
};

const LINES: usize = 1100;

const PATIENCE: Duration = Duration::from_secs(20);

fn work(server: &EtcdServer, name: &str) -> Work {
    let options = EtcdOptions { lease_ttl: Duration::from_secs(2), ..EtcdOptions::default() };
    Work::new(&[server.endpoint()], &options, name, PATIENCE).unwrap()
}

fn options(folder: &Path, output: &str) -> JobOptions {
    let output = folder.join(output);
    JobOptions {
        source: Source::open(&[folder.join("in.jsonl").display().to_string()], &output).unwrap(),
        output,
        order: Order::Input,
        plan: Plan {
            defaults: GenerateRequest::new(Input::Chat(Vec::new())),
            is_raw: false,
            fan_out: vec![vec![("a".to_owned(), 1.0)], vec![("b".to_owned(), 1.0)]],
            seed: 9,
            only: None,
        },
        keep_going: true,
        part: Part::default(),
        drive: DriveOptions { in_flight_max: 32, patience: PATIENCE, attempts_max: 3 },
        ends: Default::default(),
    }
}

/// Every hundredth line is none, and every other hundredth cannot be answered.
fn write_input(folder: &Path) {
    let line = |index: usize| match index % 100 {
        7 => "nonsense\n".to_owned(),
        57 => "{\"prompt\": \"bad\"}\n".to_owned(),
        _ => format!("{{\"id\": \"{index}\", \"prompt\": \"question {index}\"}}\n"),
    };
    std::fs::write(folder.join("in.jsonl"), (0..LINES).map(line).collect::<String>()).unwrap();
}

async fn share(server: &EtcdServer, name: &str, options: &JobOptions) -> Result<Progress, JobError> {
    run_shared(options, &work(server, name), &Function::living(usize::MAX), |_| {}).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_three_processes_share_and_one_leaves_by_death_has_the_bytes_of_one_process() {
    let Some(server) = EtcdServer::start() else { return };
    let folder = tempfile::tempdir().unwrap();
    write_input(folder.path());
    for ending in ["jsonl", "jsonl.gz", "jsonl.zst"] {
        let alone = options(folder.path(), &format!("alone.{ending}"));
        let whole = run(&alone, &Function::living(usize::MAX), |_| {}).await.unwrap();
        let shared = options(folder.path(), &format!("shared.{ending}"));
        {
            // Its lease ends by itself, as a killed process's does.
            let work = work(&server, ending);
            let function = Function::living(usize::MAX);
            let mut answered = 0;
            let life = run_shared(&shared, &work, &function, |progress| answered = progress.done);
            assert!(
                tokio::time::timeout(Duration::from_millis(150), life).await.is_err(),
                "it was done too soon"
            );
            assert!(answered > 0 && answered < whole.requests, "{answered}");
        }
        let lives = tokio::join!(share(&server, ending, &shared), share(&server, ending, &shared));
        for progress in [lives.0.unwrap(), lives.1.unwrap()] {
            assert_eq!((progress.done, progress.failed), (whole.requests, whole.failed), "{progress:?}");
        }
        assert!(std::fs::read(&shared.output).unwrap() == std::fs::read(&alone.output).unwrap(), "{ending}");
        assert!(!folder.path().join(format!("shared.{ending}.ranges")).exists());

        let asker = Function::living(0);
        let progress = run_shared(&shared, &work(&server, ending), &asker, |_| {}).await.unwrap();
        assert_eq!(progress.kept, whole.requests, "a finished job asks nothing");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_job_by_the_same_name_is_refused() {
    let Some(server) = EtcdServer::start() else { return };
    let folder = tempfile::tempdir().unwrap();
    write_input(folder.path());
    let mut options = options(folder.path(), "out.jsonl");
    share(&server, "job", &options).await.unwrap();
    options.plan.seed = 10;
    let error = share(&server, "job", &options).await.unwrap_err().to_string();
    assert!(error.starts_with("what --seed says differs"), "{error}");
    let error = share(&server, "another", &options).await.unwrap_err().to_string();
    assert!(error.contains("out.jsonl is there already"), "{error}");
    options.plan.seed = 9;
    std::fs::remove_file(&options.output).unwrap();
    let error = share(&server, "job", &options).await.unwrap_err().to_string();
    assert!(error.contains("is finished, and"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_that_was_written_elsewhere_or_changed_is_named() {
    let Some(server) = EtcdServer::start() else { return };
    let folder = tempfile::tempdir().unwrap();
    write_input(folder.path());
    let options = options(folder.path(), "out.jsonl");
    let ranges = folder.path().join("out.jsonl.ranges");
    let work = work(&server, "job");
    let function = Function::living(usize::MAX);
    // Until one range is there, and the store has it: a file alone is one that another process writes again.
    let life = run_shared(&options, &work, &function, |_| {});
    let first = async {
        let range = loop {
            if let Some((range, _)) = work.state().await.unwrap().finished.pop_first() {
                break range;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        };
        let files = std::fs::read_dir(&ranges).unwrap().map(|file| file.unwrap());
        let is_its = |file: &std::fs::DirEntry| file.file_name().to_str().unwrap().starts_with(&range);
        files.into_iter().find(is_its).unwrap().path()
    };
    let file = tokio::select! {
        ended = life => panic!("{ended:?}"),
        file = first => file,
    };
    work.leave().await;
    let content = std::fs::read(&file).unwrap();
    for (damage, told) in
        [(None, "is not here"), (Some(b"something else".as_slice()), "is not what was written")]
    {
        match damage {
            None => std::fs::remove_file(&file).unwrap(),
            Some(bytes) => std::fs::write(&file, bytes).unwrap(),
        }
        let error = share(&server, "job", &options).await.unwrap_err().to_string();
        let name = file.file_name().unwrap().to_str().unwrap();
        assert!(error.contains(told) && error.contains(name), "{error}");
        assert!(!options.output.exists());
    }
    std::fs::write(&file, content).unwrap();
    share(&server, "job", &options).await.unwrap();
}
