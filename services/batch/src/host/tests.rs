//! A host over a cluster that is a function of the request: batches that end, fail, are cancelled, expire and go on.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use std::{os::unix::fs::PermissionsExt as _, path::Path};

use serde_json::{Value, json};

use super::*;
use crate::job::tests::Function;

/// Far more than a job of these few lines takes, on any machine.
const LONGEST: Duration = Duration::from_secs(60);

/// One cluster for all owners.
struct Everybody(Arc<Function>);

impl Clusters for Everybody {
    fn of(&self, _: &Owner) -> Arc<dyn Cluster> {
        self.0.clone()
    }
}

fn everybody(life: usize) -> Arc<dyn Clusters> {
    Arc::new(Everybody(Arc::new(Function::living(life))))
}

fn options(folder: &Path) -> HostOptions {
    HostOptions {
        folder: folder.to_owned(),
        shelf: ShelfLimits { files_max: 12, bytes_max: 1 << 20 },
        batches_max: 2,
        in_flight_max: 4,
        window: Duration::from_secs(3600),
    }
}

fn open(folder: &Path, life: usize) -> Arc<Host> {
    Host::open(options(folder), everybody(life)).unwrap()
}

fn line(id: usize, prompt: &str) -> String {
    let body = json!({ "messages": [{ "role": "user", "content": prompt }], "seed": id });
    let url = Call::Chat.path();
    json!({ "custom_id": format!("r{id}"), "method": "POST", "url": url, "body": body }).to_string() + "\n"
}

async fn upload(host: &Host, text: &str) -> String {
    let mut upload = host.shelf().begin_upload().await.unwrap();
    for piece in text.as_bytes().chunks(7) {
        upload.write(piece).await.unwrap();
    }
    upload.finish(Owner::new(), "in.jsonl".into(), PURPOSE.into(), 1).await.unwrap().id
}

fn create(host: &Arc<Host>, input: &str) -> Result<BatchRecord, Failure> {
    let metadata = json!({ "a": "b" }).as_object().cloned();
    host.create(NewBatch { owner: Owner::new(), input_file_id: input.to_owned(), call: Call::Chat, metadata })
}

async fn until(host: &Host, id: &str, reached: impl Fn(&BatchRecord) -> bool) -> BatchRecord {
    let began = std::time::Instant::now();
    loop {
        let record = host.get(id).unwrap();
        if reached(&record) {
            return record;
        }
        assert!(began.elapsed() < LONGEST, "it stays {record:?}");
        sleep(Duration::from_millis(5)).await;
    }
}

fn content(host: &Host, file: Option<&String>) -> Vec<Value> {
    let text = std::fs::read_to_string(host.shelf().path(file.unwrap())).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_ends_with_a_file_of_answers_and_one_of_errors() {
    let folder = tempfile::tempdir().unwrap();
    let host = open(folder.path(), usize::MAX);
    let input = upload(&host, &(line(1, "one") + &line(2, "bad") + &line(3, "three"))).await;
    let created = create(&host, &input).unwrap();
    assert_eq!((created.status, created.endpoint.as_str()), (State::Validating, "/v1/chat/completions"));
    let ended = until(&host, &created.id, |record| record.status.is_over()).await;
    assert_eq!(ended.status, State::Completed, "{ended:?}");
    assert_eq!(ended.request_counts, Counts { total: 3, completed: 2, failed: 1 });
    assert!(ended.in_progress_at.is_some() && ended.finalizing_at.is_some() && ended.completed_at.is_some());
    assert_eq!(ended.metadata, created.metadata);
    let answers = content(&host, ended.output_file_id.as_ref());
    let ids: Vec<_> = answers.iter().map(|answer| answer["custom_id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["r1", "r3"]);
    let errors = content(&host, ended.error_file_id.as_ref());
    assert_eq!((errors[0]["custom_id"].as_str(), errors.len()), (Some("r2"), 1));
    assert_eq!(errors[0]["response"]["status_code"], 400);
    assert_eq!(errors[0]["response"]["body"]["error"]["param"], "body.input.chat");
    assert_eq!(host.list()[0], ended);
    assert_eq!(ended.as_json()["status"], "completed");
    // What it worked with goes when its record is there.
    let kept = || std::fs::read_dir(folder.path().join("batches")).unwrap().count();
    let began = std::time::Instant::now();
    while kept() > 1 {
        assert!(began.elapsed().as_secs() < 10, "only its record stays");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }

    host.delete_file(&input).unwrap();
    assert_eq!(host.shelf().get("file_id", &input).unwrap_err().status, 404);
    assert_eq!(create(&host, &input).unwrap_err().param.as_deref(), Some("input_file_id"));
    let own_output = ended.output_file_id.unwrap();
    assert_eq!(create(&host, &own_output).unwrap_err().status, 400, "an output is no input");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_with_bad_lines_fails_its_batch_and_names_them() {
    let folder = tempfile::tempdir().unwrap();
    let host = open(folder.path(), usize::MAX);
    let other = line(2, "x").replace("/v1/chat/completions", "/v1/completions");
    let text = line(1, "one") + &other + "{\"prompt\": \"short\"}\n" + &line(4, "x").replace("seed", "sed");
    let input = upload(&host, &text).await;
    let ended = until(&host, &create(&host, &input).unwrap().id, |record| record.status.is_over()).await;
    assert_eq!((ended.status, ended.output_file_id), (State::Failed, None));
    let errors = ended.errors.unwrap().data;
    let named: Vec<_> = errors.iter().map(|error| (error.line, error.param.as_deref())).collect();
    assert_eq!(named, [(Some(2), Some("url")), (Some(3), None), (Some(4), Some("body.sed"))], "{errors:?}");
    let empty = upload(&host, "\n").await;
    let ended = until(&host, &create(&host, &empty).unwrap().id, |record| record.status.is_over()).await;
    assert_eq!(ended.errors.unwrap().data[0].code, "empty_file");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_is_started_again_goes_on_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let text: String = (0..40).map(|id| line(id, &format!("question {id}"))).collect();
    let whole = {
        let host = open(folder.path(), usize::MAX);
        let input = upload(&host, &text).await;
        let ended = until(&host, &create(&host, &input).unwrap().id, |record| record.status.is_over()).await;
        std::fs::read(host.shelf().path(&ended.output_file_id.unwrap())).unwrap()
    };
    // A cluster that goes away after some answers; then the process.
    let other = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let path = other.path().to_owned();
    let first = runtime.spawn(async move {
        let host = open(&path, 20);
        let input = upload(&host, &text).await;
        let id = create(&host, &input).unwrap().id;
        until(&host, &id, |record| record.request_counts.completed > 5).await.id
    });
    let id = first.await.unwrap();
    tokio::task::spawn_blocking(move || drop(runtime)).await.unwrap();
    let kept = only_its_owner_reads(&other.path().join("batches"));
    assert!(kept.len() >= 3, "a record, an output and its journal: {kept:?}");
    let host = open(other.path(), usize::MAX);
    let ended = until(&host, &id, |record| record.status.is_over()).await;
    assert_eq!(ended.request_counts, Counts { total: 40, completed: 40, failed: 0 });
    assert!(std::fs::read(host.shelf().path(&ended.output_file_id.unwrap())).unwrap() == whole);
    let busy = Host::open(options(other.path()), everybody(0)).err().unwrap();
    assert!(busy.to_string().contains("in use by another process"), "{busy}");
    let kept = only_its_owner_reads(&other.path().join("files"));
    assert_eq!(kept.len(), 4, "the input, the answers, and a record of each: {kept:?}");
}

/// The files of a folder.
fn only_its_owner_reads(folder: &Path) -> Vec<PathBuf> {
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(folder), 0o700, "{}", folder.display());
    let files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    for file in &files {
        assert_eq!(mode(file), 0o600, "{}", file.display());
    }
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_are_cancelled_expire_and_are_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let late = HostOptions { window: Duration::ZERO, ..options(folder.path()) };
    let host = Host::open(late, everybody(0)).unwrap();
    let input = upload(&host, &line(1, "one")).await;
    let ended = until(&host, &create(&host, &input).unwrap().id, |record| record.status.is_over()).await;
    assert_eq!((ended.status, ended.expired_at.is_some()), (State::Expired, true));

    let folder = tempfile::tempdir().unwrap();
    let host = open(folder.path(), 0);
    let input = upload(&host, &(line(1, "one") + &line(2, "two"))).await;
    let [first, second] = [create(&host, &input).unwrap(), create(&host, &input).unwrap()];
    let full = create(&host, &input).unwrap_err();
    assert_eq!((full.status, full.cause.as_str()), (429, "batches_full"));
    until(&host, &first.id, |record| record.status == State::InProgress).await;
    assert_eq!(host.delete_file(&input).unwrap_err().status, 409, "it is being read");
    for id in [&first.id, &second.id] {
        let record = host.cancel(id).unwrap();
        assert!(matches!(record.status, State::Cancelling | State::Cancelled), "{record:?}");
        let ended = until(&host, id, |record| record.status.is_over()).await;
        assert_eq!((ended.status, ended.cancelled_at.is_some()), (State::Cancelled, true));
    }
    assert_eq!(host.cancel(&first.id).unwrap_err().status, 409);
    assert_eq!(host.cancel("batch_nobody").unwrap_err().status, 404);
    create(&host, &input).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_bounded_in_number_and_in_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let limits = ShelfLimits { files_max: 2, bytes_max: 100 };
    let host = HostOptions { shelf: limits, ..options(folder.path()) };
    let host = Host::open(host, everybody(0)).unwrap();
    let first = upload(&host, &"x".repeat(60)).await;
    let mut second = host.shelf().begin_upload().await.unwrap();
    second.write(&[0; 40]).await.unwrap();
    assert_eq!(second.write(&[0]).await.unwrap_err().cause, "storage_full");
    assert_eq!(host.shelf().begin_upload().await.err().unwrap().cause, "files_full");
    drop(second);
    let left = std::fs::read_dir(folder.path().join("files")).unwrap().count();
    assert_eq!(left, 2, "the first one, and its record");
    assert_eq!(create(&host, &first).unwrap_err().cause, "files_full", "a batch writes two");
    upload(&host, "more").await;
    assert_eq!(host.shelf().list().len(), 2);
}
