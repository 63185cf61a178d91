//! The admin server as Prometheus, Kubernetes and a person with curl see it.

#![allow(clippy::unwrap_used)]

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use uniarm_runtime::metrics::{TraceLabel, buckets};
use uniarm_runtime::prometheus_client::metrics::family::Family;
use uniarm_runtime::prometheus_client::metrics::gauge::Gauge;
use uniarm_runtime::steps::Step;
use uniarm_runtime::{Admin, AdminOptions, Metrics, Readiness, RuntimeError};
use uniarm_tls::{Identity, ServerTls, testing::Authority};

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
    // As Prometheus asks.
    let accept = "/metrics HTTP/1.1\r\nAccept: application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3";
    let (status, head, page) = send(admin.local_addr(), accept);

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
fn whoever_does_not_ask_for_openmetrics_gets_the_older_format() {
    let metrics = Metrics::new();
    metrics.counter("tokens", "Tokens chosen").inc_by(42);
    let answer = metrics.traced_histogram("answer_seconds", "An answer", &[1.0]);
    answer.observe(0.5, Some(TraceLabel { trace_id: "a1".to_owned() }), None);
    let names: Family<Vec<(String, String)>, Gauge> = Family::default();
    metrics.register("names", "Odd ones", names.clone());
    names.get_or_create(&vec![("name".to_owned(), "a # {b".to_owned())]).set(1);
    let admin = start(&metrics, vec![]);

    let (_, head, page) = get(admin.local_addr(), "/metrics");
    assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head}");
    let expected = [
        "# HELP uniarm_tokens_total Tokens chosen.",
        "# TYPE uniarm_tokens_total counter",
        "uniarm_tokens_total 42",
        "# TYPE uniarm_build_info gauge",
        "# TYPE uniarm_answer_seconds histogram",
        "uniarm_answer_seconds_bucket{le=\"1.0\"} 1",
        "uniarm_names{name=\"a # {b\"} 1",
    ];
    for line in expected {
        assert!(page.lines().any(|found| found == line), "{line:?} is not in\n{page}");
    }
    assert!(!page.contains("EOF") && !page.contains("trace_id"), "{page}");
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
    assert_eq!(get(admin.local_addr(), "/nowhere").0, 404);
}

#[test]
fn the_steps_of_each_engine_are_a_page_and_a_document() {
    let metrics = Metrics::new();
    let admin = start(&metrics, vec![]);
    let seen = |path: &str| get(admin.local_addr(), path);
    assert!(!seen("/").2.contains("/debug/steps"), "a router has no steps");
    assert!(seen("/debug/steps").2.contains("No engine has begun"));

    let (base, reward) = (metrics.scope("base").steps("base"), metrics.steps("reward"));
    for tokens_chosen in 1..=5 {
        let step = Step { tokens_chosen, forward_us: 700, wait_us: 40, ..Step::default() };
        base.publish(Instant::now(), step);
    }
    assert!(seen("/").2.contains("<a href=\"/debug/steps\">"));
    let (status, head, page) = seen("/debug/steps?refresh=2&last=3");
    assert_eq!(status, 200);
    assert!(head.contains("content-type: text/html") && head.contains("default-src 'none'"), "{head}");
    assert!(page.contains("http-equiv=\"refresh\" content=\"2\"") && !page.contains("<script"), "{page}");
    assert!(page.contains("<h2>base</h2>") && page.contains("<h2>reward</h2><p>No steps yet."), "{page}");
    assert_eq!(page.matches("<title>step ").count(), 3, "{page}");

    for request in [
        "/debug/steps?last=2&format=json HTTP/1.1\r\nAccept: text/html",
        "/debug/steps?last=2 HTTP/1.1\r\nAccept: application/json",
    ] {
        let (_, head, document) = send(admin.local_addr(), request);
        assert!(head.contains("content-type: application/json"), "{head}");
        let document: serde_json::Value = serde_json::from_str(&document).unwrap();
        let engines = document["engines"].as_array().unwrap();
        assert_eq!(engines.len(), 2);
        assert_eq!(engines[1]["engine"], "reward");
        let steps = engines[0]["steps"].as_array().unwrap();
        assert_eq!(steps.len(), 2);
        assert_eq!((&steps[1]["number"], &steps[1]["tokens_chosen"]), (&5.into(), &5.into()));
        assert_eq!((&steps[1]["forward_us"], &steps[1]["wait_us"]), (&700.into(), &40.into()));
        assert!(steps[1]["age_ms"].as_f64().unwrap() < 60_000.0);
    }
    drop(reward);
    let (status, _, reason) = seen("/debug/steps?last=100000");
    assert_eq!((status, reason.as_str()), (400, "last=100000: wants a number of steps from 1 to 512\n"));
}

#[tokio::test]
async fn an_admin_port_with_a_certificate_is_read_over_tls_alone_and_by_those_it_knows() {
    let folder = tempfile::tempdir().unwrap();
    let ours = Authority::new(folder.path(), "ours");
    let own = ours.issue("admin", &["127.0.0.1"]);
    let admin = |clients| {
        let tls = ServerTls::front(own.certificate.clone(), own.key.clone(), clients, &[b"http/1.1"]);
        let address = "127.0.0.1:0".to_owned();
        let options =
            AdminOptions { address, metrics: Metrics::new(), roles: vec![], tls: Some(tls.unwrap()) };
        Admin::start(options).unwrap()
    };
    let client = |identity: Option<&Identity>| web_client(&ours.file, identity);
    let open = admin(None);
    assert!(secure_get(open.local_addr(), &client(None)).await.unwrap().ends_with("alive\n"));
    let (status, head) = tokio::task::spawn_blocking(move || {
        let mut plain = TcpStream::connect(open.local_addr()).unwrap();
        let _ = plain.write_all(b"GET /metrics HTTP/1.1\r\n\r\n");
        let mut answer = Vec::new();
        (plain.read_to_end(&mut answer).is_ok(), answer)
    })
    .await
    .unwrap();
    assert!(!status || !head.starts_with(b"HTTP/1.1 200"), "it answered without TLS");

    let closed = admin(Some(ours.file.clone()));
    assert!(secure_get(closed.local_addr(), &client(None)).await.is_err(), "it wants a certificate");
    let reader = ours.issue("prometheus", &["prometheus"]);
    let reader = client(Some(&reader));
    assert!(secure_get(closed.local_addr(), &reader).await.unwrap().ends_with("alive\n"));

    // Another certificate, and the next connection has it; one of somebody else's is seen for what it is.
    let _ = ours.issue("admin", &["127.0.0.1"]);
    secure_get(closed.local_addr(), &reader).await.unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let theirs = Authority::new(elsewhere.path(), "theirs").issue("admin", &["127.0.0.1"]);
    std::fs::rename(&theirs.certificate, &own.certificate).unwrap();
    std::fs::rename(&theirs.key, &own.key).unwrap();
    assert!(secure_get(closed.local_addr(), &reader).await.is_err(), "the files changed");
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
    let options =
        || AdminOptions { address: address.clone(), metrics: Metrics::new(), roles: vec![], tls: None };

    let refused = Admin::start(options()).err().unwrap();
    assert!(matches!(refused, RuntimeError::Bind { .. }), "{refused}");
    assert!(refused.to_string().contains(&address), "{refused}");

    drop(first);
    Admin::start(options()).unwrap();
}

fn start(metrics: &Metrics, roles: Vec<(&'static str, Readiness)>) -> Admin {
    let options =
        AdminOptions { address: "127.0.0.1:0".to_owned(), metrics: metrics.clone(), roles, tls: None };
    Admin::start(options).unwrap()
}

/// As a browser or Prometheus connects.
fn web_client(authority: &Path, identity: Option<&Identity>) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(authority).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match identity {
        None => config.with_no_client_auth(),
        Some(Identity { certificate, key, .. }) => {
            let chain = vec![CertificateDer::from_pem_file(certificate).unwrap()];
            config.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(key).unwrap()).unwrap()
        }
    };
    TlsConnector::from(Arc::new(config))
}

async fn secure_get(address: SocketAddr, tls: &TlsConnector) -> std::io::Result<String> {
    let stream = tokio::net::TcpStream::connect(address).await?;
    let mut stream = tls.connect(address.ip().into(), stream).await?;
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

/// Status, headers in lower case, body.
fn get(address: SocketAddr, path: &str) -> (u16, String, String) {
    send(address, &format!("{path} HTTP/1.1"))
}

/// The same, with the rest of the first line, and headers after it.
fn send(address: SocketAddr, request: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {request}\r\nHost: {address}\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_lowercase(), body.to_owned())
}
