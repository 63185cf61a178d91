//! The admin server as Prometheus, Kubernetes and a person with curl see it.

#![allow(clippy::unwrap_used)]

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use uniarm_runtime::metrics::buckets;
use uniarm_runtime::prometheus_client::metrics::family::Family;
use uniarm_runtime::prometheus_client::metrics::gauge::Gauge;
use uniarm_runtime::{Admin, AdminOptions, Metrics, Readiness, RuntimeError};

#[test]
fn metrics_of_several_roles_are_scraped_from_one_page() {
    let metrics = Metrics::new();
    let (base, reward) = (metrics.scope("base"), metrics.scope("reward"));
    let tokens = base.counter("tokens", "Tokens chosen");
    let step = base.histogram("step_seconds", "One step", &buckets::SECONDS);
    base.gauge("queue_depth", "Sequences that wait").set(3);
    reward.gauge("queue_depth", "Sessions that wait").set(5);
    let blocks: Family<Vec<(String, String)>, Gauge> = Family::default();
    reward.scope("cache").register("blocks", "Blocks by state", blocks.clone());
    blocks.get_or_create(&vec![("state".to_owned(), "free".to_owned())]).set(7);
    let admin = start(&metrics, vec![]);

    tokens.inc_by(41);
    tokens.inc();
    step.observe(0.02);
    let (status, head, page) = get(admin.local_addr(), "/metrics");

    assert_eq!(status, 200);
    assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0"), "{head}");
    for line in [
        concat!("uniarm_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
        "# HELP uniarm_base_tokens Tokens chosen.",
        "uniarm_base_tokens_total 42",
        "uniarm_base_step_seconds_bucket{le=\"0.01\"} 0",
        "uniarm_base_step_seconds_bucket{le=\"0.025\"} 1",
        "uniarm_base_step_seconds_count 1",
        "uniarm_base_queue_depth 3",
        "uniarm_reward_queue_depth 5",
        "uniarm_reward_cache_blocks{state=\"free\"} 7",
    ] {
        assert!(page.lines().any(|found| found == line), "{line:?} is not in\n{page}");
    }
    assert!(page.ends_with("# EOF\n"), "OpenMetrics ends with its mark, once: {page}");
    assert_eq!(page.matches("# EOF").count(), 1);
}

#[test]
fn a_process_is_alive_at_once_and_ready_when_all_its_roles_are() {
    let (base, reward) = (Readiness::starting(), Readiness::starting());
    let admin = start(&Metrics::new(), vec![("base", base.clone()), ("reward", reward.clone())]);
    let ready = || {
        let (status, _, page) = get(admin.local_addr(), "/readyz");
        (status, page)
    };

    assert_eq!(get(admin.local_addr(), "/healthz").0, 200);
    assert_eq!(ready(), (503, "base: starting\nreward: starting\n".to_owned()));
    base.set_ready();
    reward.set_not_ready("loading the model");
    assert_eq!(ready(), (503, "base: ready\nreward: loading the model\n".to_owned()));
    reward.set_ready();
    assert_eq!(ready(), (200, "base: ready\nreward: ready\n".to_owned()));
    base.set_not_ready(format!("draining {} sequences", 3));
    assert_eq!(ready(), (503, "base: draining 3 sequences\nreward: ready\n".to_owned()));
    assert_eq!(get(admin.local_addr(), "/healthz").0, 200, "a process that drains is alive");
    assert_eq!(get(admin.local_addr(), "/").0, 404);
}

#[tokio::test]
async fn a_process_whose_only_worker_thread_is_busy_still_answers() {
    let admin = start(&Metrics::new(), vec![]);
    // A blocking client on this runtime's only thread: nothing but the server's own thread can answer it.
    assert_eq!(get(admin.local_addr(), "/healthz").0, 200);
}

#[test]
fn a_taken_port_is_an_error_that_names_the_address_and_a_dropped_server_frees_it() {
    let first = start(&Metrics::new(), vec![]);
    let address = first.local_addr().to_string();
    let options = || AdminOptions { address: address.clone(), metrics: Metrics::new(), roles: vec![] };

    let refused = Admin::start(options()).err().unwrap();
    assert!(matches!(refused, RuntimeError::Bind { .. }), "{refused}");
    assert!(refused.to_string().contains(&address), "{refused}");

    drop(first);
    Admin::start(options()).unwrap();
}

fn start(metrics: &Metrics, roles: Vec<(&'static str, Readiness)>) -> Admin {
    let options = AdminOptions { address: "127.0.0.1:0".to_owned(), metrics: metrics.clone(), roles };
    Admin::start(options).unwrap()
}

/// Status, headers in lower case, body.
fn get(address: SocketAddr, path: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_lowercase(), body.to_owned())
}
