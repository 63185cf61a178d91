//! Clients that stop reading: their connections answer, and nothing that they hold is kept for them.

use std::time::{Duration, Instant};

use tokio::{io::AsyncWriteExt as _, net::TcpSocket};
use tonic::transport::Endpoint;
use uniarm_proto::{
    ClusterClient, Event, GenerateRequest, Progress, Transcript, client, pb,
    refusal::{CLIENT_STALLED, cause_of},
};

use crate::harness::{Cluster, PROMPTED, machine, request};

/// The router waits a second for a client; the rest is for a busy machine.
const GIVEN_BACK_WITHIN: Duration = Duration::from_secs(100);

/// More than a machine's buffers hold on the way to a client that reads nothing.
const LONG: u32 = 4000;

fn asked(tokens: u32) -> GenerateRequest {
    let mut asked = request("Tell me of the sea.", &[("positive", 0.7), ("concise", 0.3)]);
    asked.sampling.max_tokens = tokens;
    asked.sampling.ignore_eos = true;
    asked
}

/// Waits until a stalled client has been counted, and holds nothing anywhere.
async fn given_back(cluster: &Cluster, stalled: f64) {
    let held = || {
        let metric = |name: &str| cluster.router.metric(name);
        let counted = metric(r#"uniarm_router_requests_total{outcome="stalled",code="unavailable"}"#);
        let under_way = metric("uniarm_router_requests_under_way");
        let workers = [metric("uniarm_base_requests_held"), metric("uniarm_reward_sessions")];
        (counted, under_way, workers)
    };
    let began = Instant::now();
    while held() != (stalled, 0.0, [0.0, 0.0]) {
        assert!(began.elapsed() < GIVEN_BACK_WITHIN, "{:?}", held());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_read_holds_nothing_and_may_go_on_where_it_stopped() {
    let _machine = machine();
    let cluster = Cluster::up(&[&PROMPTED[..], &["--client-stall-timeout", "1"]].concat());
    let whole = ClusterClient::new(&[&cluster.router.address]).unwrap();
    let undisturbed = whole.complete(asked(400), None).await.unwrap();

    // A window of a few events: the connection's own pings are answered all the time.
    let endpoint = Endpoint::from_shared(format!("http://{}", cluster.router.address)).unwrap();
    let channel = endpoint.initial_stream_window_size(512).connect().await.unwrap();
    let wire = pb::GenerateRequest::from(asked(400));
    let mut events = client::inference(channel).generate(wire).await.unwrap().into_inner();
    let (mut transcript, mut progress) = (Transcript::default(), Progress::default());
    let mut stalled = false;
    let status = loop {
        match events.message().await {
            Ok(Some(response)) => {
                let event = response.event.unwrap();
                progress.record(&event).unwrap();
                transcript.apply(&event).unwrap();
                if matches!(event, Event::Tokens(_)) && !std::mem::replace(&mut stalled, true) {
                    given_back(&cluster, 1.0).await;
                }
            }
            Ok(None) => panic!("it ended as if nothing had happened"),
            Err(status) => break status,
        }
    };
    assert_eq!(cause_of(&status).as_deref(), Some(CLIENT_STALLED), "{status}");
    assert!(progress.tokens() < 400, "it was not stalled");
    let mut rest = whole.go_on(asked(400), progress, None);
    while let Some(event) = rest.next().await {
        let event = event.unwrap();
        if !matches!(event, Event::Started(_)) {
            transcript.apply(&event).unwrap();
        }
    }
    assert_eq!(transcript.choices, undisturbed.choices);

    // Over HTTP, where nothing but the socket says that nobody reads.
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let address = cluster.http.parse().unwrap();
    let mut unread = socket.connect(address).await.unwrap();
    let body = serde_json::json!({
        "stream": true, "max_tokens": LONG, "ignore_eos": true, "logprobs": true, "top_logprobs": 20,
        "messages": [{"role": "user", "content": "Tell me of the sea."}],
    });
    let body = body.to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    unread.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    let began = Instant::now();
    given_back(&cluster, 2.0).await;
    println!("over HTTP it was given back after {:?}", began.elapsed());
}
