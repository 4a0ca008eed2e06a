use super::*;
use std::io::Write as _;
use std::net::Ipv6Addr;

use proptest::prelude::*;
use tempfile::TempDir;
use tokio::io::AsyncBufReadExt;
use tokio::sync::oneshot;

use crate::control::client::{Client, ClientError};
use crate::control::report::{FilterMode, ListenerRow, Mac, MigrationPhase};
use crate::control::{Progress, command, request};

const DEADLINE: Duration = Duration::from_secs(30);

fn row(n: u32) -> ListenerRow {
    ListenerRow {
        domain: Some(format!("viewer-{}", n % 64)),
        port: format!("vnet{}", n % 64),
        vlan: 0,
        multicast_address: Ipv6Addr::from_bits((0xff3e << 112) | u128::from(n)),
        filter_mode: FilterMode::Exclude,
        sources: Vec::new(),
        mld_version: 2,
        age_ms: u64::from(n),
        first_report_age_ms: u64::from(n),
        guest_mac: Mac([0x52, 0x54, 0, 1, 2, 3]),
    }
}

/// A server whose event loop is the closure `answer`.
struct Agent {
    directory: TempDir,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Agent {
    fn start(mut answer: impl FnMut(ControlRequest<request::Agent>) + Send + 'static) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.sock");
        let (stop, stopped) = oneshot::channel();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async move {
                let server = ControlServer::bind(&path).unwrap();
                ready.send(()).unwrap();
                let (requests, mut incoming) = mpsc::channel(8);
                tokio::spawn(async move {
                    while let Some(request) = incoming.recv().await {
                        answer(request);
                    }
                });
                let shutdown = async {
                    let _ = stopped.await;
                };
                server.serve(requests, shutdown).await;
            });
        });
        is_ready.recv_timeout(DEADLINE).unwrap();
        Self {
            directory,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("agent.sock")
    }

    fn client(&self) -> Client {
        Client::connect(&self.socket()).unwrap()
    }

    /// Sends raw bytes and reads lines until `count` lines have come or the connection ends.
    fn raw(&self, bytes: &[u8], count: usize) -> Vec<String> {
        use std::io::BufRead;
        let mut stream = std::os::unix::net::UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        std::io::BufReader::new(stream)
            .lines()
            .map_while(Result::ok)
            .take(count)
            .collect()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn with_listeners(count: u32) -> Agent {
    Agent::start(move |request| {
        let rows = (0..count).map(row).collect();
        let _ = request.replies.send(Reply::Listeners(rows));
    })
}

#[test]
fn long_table_arrives_whole_and_in_order() {
    let agent = with_listeners(64_000);
    let mut out = Vec::new();
    command::show(&agent.socket(), request::Table::Listeners, true, &mut out).unwrap();
    let rows: Vec<ListenerRow> = serde_json::from_slice(&out).unwrap();
    assert_eq!(rows.len(), 64_000);
    assert!(rows.iter().zip(0..).all(|(row, n)| row.age_ms == n));
}

#[test]
fn connection_may_ask_again() {
    let agent = with_listeners(1);
    let mut client = agent.client();
    for _ in 0..3 {
        let mut rows = 0;
        client
            .ask(&request::Agent::Listeners, |reply| {
                if let Reply::Listeners(part) = reply {
                    rows += part.len();
                }
            })
            .unwrap();
        assert_eq!(rows, 1);
    }
}

#[test]
fn progress_comes_before_the_end_and_a_refusal_is_verbatim() {
    let agent = Agent::start(|request| {
        let progress = Progress {
            phase: MigrationPhase::Copying,
            processed_bytes: 1,
            total_bytes: 2,
        };
        let _ = request.replies.send(Reply::Progress(progress));
        let _ = request
            .replies
            .send(Reply::Error("Domain \"a\" is gone".to_owned()));
    });
    let mut seen = Vec::new();
    let request = request::Agent::Migrate {
        domain: "a".to_owned(),
        destination: "b".to_owned(),
    };
    let error = agent
        .client()
        .ask(&request, |reply| seen.push(reply))
        .expect_err("accepted");
    assert!(matches!(error, ClientError::Refused(reason) if reason == "Domain \"a\" is gone"));
    assert!(matches!(seen.as_slice(), [Reply::Progress(_)]));
}

#[test]
fn bad_requests_are_answered_and_the_next_is_served() {
    let agent = with_listeners(0);
    let lines = agent.raw(
        b"nonsense\n{\"request\":\"dance\"}\n{\"request\":\"abort\"}\n{\"request\":\"listeners\"}\n",
        10,
    );
    assert_eq!(lines.len(), 4, "{lines:?}");
    for line in lines.iter().take(3) {
        assert!(
            line.starts_with(r#"{"reply":"error","data":"The request is not"#),
            "{line}"
        );
    }
    assert_eq!(lines[3], r#"{"reply":"end"}"#);
}

#[test]
fn oversized_request_is_refused_and_the_connection_closed() {
    let agent = with_listeners(0);
    let mut request = vec![b' '; MAX_REQUEST_BYTES];
    request.extend_from_slice(b"{\"request\":\"listeners\"}\n");
    let lines = agent.raw(&request, 10);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("more than 4096 bytes"), "{lines:?}");
}

#[test]
fn socket_is_for_its_owner_only_and_goes_with_the_agent() {
    let agent = with_listeners(0);
    let path = agent.socket();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let directory = tempfile::tempdir().unwrap();
    let kept = directory.path().join("link");
    std::os::unix::fs::symlink(&path, &kept).unwrap();
    drop(agent);
    assert!(std::fs::metadata(&kept).is_err(), "the file is still there");
}

#[test]
fn second_agent_is_refused_and_a_dead_ones_socket_is_replaced() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let _guard = runtime.enter();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("run/agent.sock");
    let first = ControlServer::bind(&path).unwrap();
    let error = ControlServer::bind(&path).expect_err("bound twice");
    assert!(
        error
            .to_string()
            .starts_with("Another agent already listens"),
        "{error}"
    );
    // A killed agent leaves its file behind, and no process listens.
    drop(first);
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    ControlServer::bind(&path).unwrap();

    let file = directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(
        ControlServer::bind(&file),
        Err(ControlError::NoSocket { .. })
    ));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
}

#[test]
fn connections_are_bounded() {
    let agent = with_listeners(0);
    // A client that has its answer is certainly served.
    let mut clients: Vec<Client> = (0..MAX_CONNECTIONS).map(|_| agent.client()).collect();
    for client in &mut clients {
        client.ask(&request::Agent::Listeners, |_| {}).unwrap();
    }
    let error = agent
        .client()
        .ask(&request::Agent::Listeners, |_| {})
        .expect_err("served");
    assert!(error.to_string().contains("already serves 16"), "{error}");
}

#[test]
fn agent_that_is_not_there_is_named() {
    let error = Client::connect(Path::new("/nonexistent/agent.sock")).expect_err("connected");
    assert!(
        error
            .to_string()
            .starts_with("No agent listens on /nonexistent"),
        "{error}"
    );
}

#[tokio::test]
async fn stopping_agent_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.sock");
    let server = ControlServer::bind(&path).unwrap();
    let (requests, incoming) = mpsc::channel::<ControlRequest<request::Agent>>(1);
    drop(incoming);
    tokio::spawn(server.serve(requests, std::future::pending()));
    let mut stream = UnixStream::connect(&path).await.unwrap();
    stream
        .write_all(b"{\"request\":\"status\"}\n")
        .await
        .unwrap();
    let mut line = String::new();
    let mut reader = BufReader::new(stream);
    timeout(DEADLINE, reader.read_line(&mut line))
        .await
        .unwrap()
        .unwrap();
    assert!(line.contains("The agent is stopping"), "{line}");
}

proptest! {
    #[test]
    fn any_line_is_decoded_or_refused(line in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = decode::<request::Agent>(&line);
        let _ = serde_json::from_slice::<Reply>(&line);
    }

    #[test]
    fn requests_survive_the_wire(domain in "\\PC{0,40}", destination in "\\PC{0,40}") {
        let request = request::Agent::Migrate { domain, destination };
        let line = serde_json::to_vec(&request).unwrap();
        prop_assert_eq!(decode(&line), Ok(request));
    }
}

fn trace_request() -> request::Agent {
    request::Agent::Trace(crate::control::trace::TraceRequest {
        programs: Vec::new(),
        port: None,
        address: None,
        rate: 10,
    })
}

#[test]
fn lines_of_a_trace_come_until_the_agent_ends_it() {
    let agent = Agent::start(|request| {
        let lines = request.lines.expect("a trace has a queue");
        request.replies.send(Reply::Tracing).unwrap();
        tokio::spawn(async move {
            for left_out in 1..=3 {
                lines.send(TraceLine::LeftOut { left_out }).await.unwrap();
            }
            drop(request.replies);
        });
    });
    let mut replies = Vec::new();
    agent
        .client()
        .follow(&trace_request(), |reply| {
            replies.push(reply);
            Ok(())
        })
        .unwrap();
    assert_eq!(replies.first(), Some(&Reply::Tracing));
    assert!(replies.len() <= 4);
}

#[test]
fn operator_who_goes_closes_the_queue_of_the_trace() {
    let (sender, queues) = std::sync::mpsc::channel();
    let agent = Agent::start(move |request| {
        sender
            .send((request.lines.unwrap(), request.replies))
            .unwrap();
    });
    let mut stream = std::os::unix::net::UnixStream::connect(agent.socket()).unwrap();
    let mut line = serde_json::to_vec(&trace_request()).unwrap();
    line.push(b'\n');
    stream.write_all(&line).unwrap();
    let (lines, _replies) = queues.recv_timeout(DEADLINE).unwrap();
    drop(stream);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let closed = runtime.block_on(async { timeout(DEADLINE, lines.closed()).await });
    closed.expect("the queue is closed");
}

#[test]
fn lines_beyond_the_queue_are_refused_at_once() {
    let (sender, counts) = std::sync::mpsc::channel();
    let agent = Agent::start(move |request| {
        let lines = request.lines.unwrap();
        let line = || TraceLine::LeftOut { left_out: 1 };
        let taken = (0..100_000)
            .take_while(|_| lines.try_send(line()).is_ok())
            .count();
        sender.send(taken).unwrap();
    });
    let mut stream = std::os::unix::net::UnixStream::connect(agent.socket()).unwrap();
    let mut line = serde_json::to_vec(&trace_request()).unwrap();
    line.push(b'\n');
    stream.write_all(&line).unwrap();
    let taken = counts.recv_timeout(DEADLINE).unwrap();
    assert_eq!(taken, TRACE_LINES, "nobody has written any of them");
}
