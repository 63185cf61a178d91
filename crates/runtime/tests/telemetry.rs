//! One call traced through two processes' worth of spans, as an OpenTelemetry collector receives it.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
    trace_service_server::{TraceService, TraceServiceServer},
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status};
use tracing::Instrument as _;
use uniarm_proto::pb::membership_server::{Membership, MembershipServer};
use uniarm_proto::{client, pb};
use uniarm_runtime::grpc::{GrpcOptions, GrpcServer};
use uniarm_runtime::metrics::TracedHistogram;
use uniarm_runtime::{Metrics, Readiness, Shutdown, TelemetryOptions, telemetry, trace};

const PATIENCE: Duration = Duration::from_secs(10);

/// As a client outside sends it: version, trace, span, flags.
const SAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const NOT_SAMPLED: &str = "00-1bf7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";

/// Keeps what it is sent.
struct Collector {
    received: mpsc::UnboundedSender<ExportTraceServiceRequest>,
}

/// Writes a log line within a span of its own, and observes something in it.
struct Describer(TracedHistogram);

#[tokio::test(flavor = "multi_thread")]
async fn a_call_is_one_trace_from_the_outside_client_to_the_innermost_span() {
    let (received, mut exports) = mpsc::unbounded_channel();
    let collector = serve(|server| server.add_service(TraceServiceServer::new(Collector { received }))).await;
    let guard = telemetry::init(&TelemetryOptions {
        service: "uniarm-test".to_owned(),
        // Logs the connections' spans, among them the exporter's own; they are not to be exported.
        log_filter: "info,h2::proto::connection=debug".to_owned(),
        otlp_endpoint: Some(format!("http://{collector}")),
        ..TelemetryOptions::default()
    })
    .unwrap();
    let metrics = Metrics::new();
    let took = metrics.traced_histogram("took_seconds", "What it took", &[1.0, 2.0]);
    let describer = serve(|server| server.add_service(MembershipServer::new(Describer(took)))).await;

    for traceparent in [SAMPLED, NOT_SAMPLED] {
        let mut outside = Request::new(());
        outside.metadata_mut().insert("traceparent", traceparent.parse().unwrap());
        let relay = tracing::info_span!("relay");
        trace::extract(outside.metadata(), &relay);
        let channel = client::endpoint(&describer).unwrap().connect_lazy();
        let mut membership =
            pb::membership_client::MembershipClient::with_interceptor(channel, trace::TraceInterceptor);
        membership.describe(pb::DescribeRequest {}).instrument(relay).await.unwrap();
    }
    let page = metrics.encode();
    let exemplars: Vec<_> = page.lines().filter_map(|line| line.split_once(" # ")).collect();
    let [(bucket, exemplar)] = exemplars[..] else { panic!("{page}") };
    assert_eq!(
        bucket, "uniarm_took_seconds_bucket{le=\"1.0\"} 2",
        "the one without a sampled trace counts too"
    );
    assert!(exemplar.starts_with("{trace_id=\"0af7651916cd43dd8448eb211c80319c\"} 0.5"), "{exemplar}");
    assert!(telemetry::init(&TelemetryOptions::default()).is_err(), "a process has one subscriber");
    // The end of the process sends what is left.
    tokio::task::spawn_blocking(move || drop(guard)).await.unwrap();

    let export = tokio::time::timeout(PATIENCE, exports.recv()).await.unwrap().unwrap();
    let [resource_spans] = &export.resource_spans[..] else { panic!("{export:?}") };
    let attributes = &resource_spans.resource.as_ref().unwrap().attributes;
    let service = attributes.iter().find(|attribute| attribute.key == "service.name").unwrap();
    assert_eq!(service.value.as_ref().unwrap().value, Some(Value::StringValue("uniarm-test".to_owned())));
    let spans: Vec<&Span> = resource_spans.scope_spans.iter().flat_map(|scope| &scope.spans).collect();
    assert_eq!(spans.len(), 3, "relay, call and innermost of the sampled trace only: {spans:?}");
    let span = |name: &str| *spans.iter().find(|span| span.name == name).unwrap();
    let (relay, call, innermost) = (span("relay"), span("uniarm.v1.Membership/Describe"), span("innermost"));
    assert_eq!(hex(&relay.trace_id), "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(hex(&relay.parent_span_id), "b7ad6b7169203331");
    assert_eq!((&call.trace_id, &call.parent_span_id), (&relay.trace_id, &relay.span_id));
    assert_eq!((&innermost.trace_id, &innermost.parent_span_id), (&call.trace_id, &call.span_id));
    assert_eq!(call.kind(), SpanKind::Server);
    assert!(call.attributes.iter().any(|attribute| attribute.key == "rpc.method"), "{call:?}");
    assert_eq!(innermost.events[0].name, "described");
}

/// Serves on a free port of loopback, until the runtime ends; host:port.
async fn serve(add: impl FnOnce(GrpcServer) -> GrpcServer) -> String {
    let server =
        GrpcServer::bind("127.0.0.1:0", GrpcOptions::default(), Readiness::starting()).await.unwrap();
    let address = server.local_addr().to_string();
    tokio::spawn(add(server).serve(Shutdown::new()));
    address
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let _ = self.received.send(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl Membership for Describer {
    async fn describe(&self, _: Request<pb::DescribeRequest>) -> Result<Response<pb::Member>, Status> {
        let innermost = tracing::info_span!("innermost");
        innermost.in_scope(|| tracing::info!("described"));
        self.0.observe(0.5, trace::label(&innermost), None);
        Ok(Response::new(pb::Member::default()))
    }
}
