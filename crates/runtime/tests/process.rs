//! A process of its own: how it obeys signals, logs, and ends when its collector is away.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use uniarm_runtime::{LogFormat, Shutdown, TelemetryOptions, telemetry};

/// Tells the process below how to behave.
const BEHAVIOUR_VARIABLE: &str = "UNIARM_TEST_BEHAVIOUR";

const PATIENCE: Duration = Duration::from_secs(10);

#[test]
fn the_first_signal_drains_and_the_second_exits() {
    for (signals, status) in [(["TERM", "TERM"], 143), (["INT", "TERM"], 143), (["TERM", "INT"], 130)] {
        let mut process = start("hang while draining");
        let mut log = BufReader::new(process.stderr.take().unwrap()).lines().map(Result::unwrap);
        assert!(log.any(|line| line.contains("up")));
        kill(&process, signals[0]);
        assert!(log.any(|line| line.contains("draining")), "the program learns of the first signal");
        assert!(process.try_wait().unwrap().is_none(), "and lives on");
        kill(&process, signals[1]);
        assert_eq!(process.wait().unwrap().code(), Some(status), "{signals:?}");
    }
}

#[test]
fn logs_are_one_json_object_a_line_when_asked_for() {
    let mut process = start("log json");
    let mut log = String::new();
    process.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    assert!(process.wait().unwrap().success(), "{log}");
    let lines: Vec<serde_json::Value> =
        log.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"))).collect();
    let line = lines.iter().find(|line| line["message"] == "a token").unwrap();
    assert_eq!((&line["level"], &line["position"]), (&"INFO".into(), &7.into()));
    assert_eq!((&line["span"]["name"], &line["span"]["request"]), (&"generate".into(), &"r-1".into()));
    assert!(!log.contains("unheard"), "the filter is obeyed: {log}");
}

#[test]
fn a_collector_that_is_away_delays_the_end_by_a_few_seconds_at_most() {
    let mut process = start("no collector");
    let started = Instant::now();
    assert!(process.wait().unwrap().success());
    assert!(started.elapsed() < PATIENCE, "{:?}", started.elapsed());
}

/// Not a test of its own: the process that the tests above start.
#[tokio::test]
#[ignore = "run by the other tests of this file"]
async fn the_process() {
    match std::env::var(BEHAVIOUR_VARIABLE).unwrap().as_str() {
        "hang while draining" => {
            let _guard = telemetry::init(&TelemetryOptions::default()).unwrap();
            let shutdown = Shutdown::on_signals().unwrap();
            tracing::info!("up");
            shutdown.begun().await;
            tracing::info!("draining");
            std::future::pending::<()>().await;
        }
        "log json" => {
            let options = TelemetryOptions {
                log_format: LogFormat::Json,
                log_filter: "info,process=warn,process[generate]=info".to_owned(),
                ..TelemetryOptions::default()
            };
            let _guard = telemetry::init(&options).unwrap();
            tracing::info!("unheard");
            tracing::info_span!("generate", request = "r-1")
                .in_scope(|| tracing::info!(position = 7, "a token"));
        }
        "no collector" => {
            let options = TelemetryOptions {
                // A port of loopback that nobody listens on.
                otlp_endpoint: Some("http://127.0.0.1:1".to_owned()),
                ..TelemetryOptions::default()
            };
            let _guard = telemetry::init(&options).unwrap();
            tracing::info_span!("lost").in_scope(|| tracing::info!("nobody will see this span"));
        }
        other => panic!("{other}"),
    }
}

fn start(behaviour: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_process", "--ignored", "--nocapture"])
        .env(BEHAVIOUR_VARIABLE, behaviour)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn kill(process: &Child, signal: &str) {
    // The shell's own: a bare system has no program of that name.
    let command = format!("kill -s {signal} {}", process.id());
    let status = Command::new("sh").args(["-c", &command]).status().unwrap();
    assert!(status.success());
}
