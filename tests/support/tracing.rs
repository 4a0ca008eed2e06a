//! The tracing parts of an agent (gates, tracers and the operator's socket) over a data path that
//! the test attaches; and operators who trace.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use roamcast::config::Handover;
use roamcast::control::request;
use roamcast::control::server::ControlServer;
use roamcast::control::trace::TraceRequest;
use roamcast::datapath::Datapath;
use roamcast::proto::GateCommand;
use roamcast::runtime::agent::gates::Gates;
use roamcast::runtime::trace::Tracing;
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::{mpsc, oneshot};

use super::netns::wait_for;

/// The running parts. Dropping them stops them in the agent's order.
pub struct Agent {
    directory: TempDir,
    gates: mpsc::UnboundedSender<GateCommand>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Agent {
    /// Starts the parts in the network namespace of the calling thread.
    pub fn start(datapath: &Datapath) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.sock");
        let (gates, mut commands) = mpsc::unbounded_channel();
        let (stop, mut stopped) = oneshot::channel::<()>();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let datapath = datapath.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async move {
                let tracing = Tracing::start(&datapath);
                // On a slow machine, the command to replay may follow the packet late.
                let handover = Handover {
                    held: Duration::from_secs(60),
                    ..Handover::default()
                };
                let mut gates = Gates::start(&datapath, &handover, tracing.replays()).unwrap();
                let (sender, mut requests) = mpsc::channel(8);
                let server = ControlServer::bind(&path).unwrap();
                tokio::spawn(server.serve(sender, std::future::pending()));
                ready.send(()).unwrap();
                loop {
                    tokio::select! {
                        _ = &mut stopped => return,
                        Some(command) = commands.recv() => gates.perform(command),
                        _ = gates.next() => {}
                        Some(request) = requests.recv() => match request.request {
                            request::Agent::Trace(trace) => {
                                tracing.add(trace, request.replies, request.lines);
                            }
                            // Ending the answer shows that the agent continues.
                            _ => drop(request.replies),
                        },
                    }
                }
            });
        });
        is_ready.recv().unwrap();
        Self {
            directory,
            gates,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// Returns the path of the control socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("agent.sock")
    }

    /// Gives the gates a command, as the agent's event loop does.
    pub fn gate(&self, command: GateCommand) {
        self.gates.send(command).unwrap();
    }

    /// Returns true if the agent answers.
    pub fn is_alive(&self) -> bool {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.write_all(b"{\"request\":\"status\"}\n").unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        line == "{\"reply\":\"end\"}\n"
    }

    /// Traces everything.
    pub fn trace(&self) -> Tracer {
        self.trace_with(|_| ())
    }

    /// Traces with a modified request. Returns once the programs report.
    pub fn trace_with(&self, change: impl FnOnce(&mut TraceRequest)) -> Tracer {
        let mut request = TraceRequest {
            programs: Vec::new(),
            port: None,
            address: None,
            rate: 100_000,
        };
        change(&mut request);
        let tracer = Tracer::ask(&self.socket(), request);
        wait_for("the traced programs", || {
            let lines = tracer.replies.lock().unwrap();
            lines
                .iter()
                .any(|it| it["reply"] == "tracing")
                .then_some(())
        });
        tracer
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

/// An operator on the socket itself.
pub struct Tracer {
    stream: UnixStream,
    replies: Arc<Mutex<Vec<Value>>>,
    reader: Option<JoinHandle<()>>,
}

impl Tracer {
    /// Requests a trace, and reads the replies in the background.
    pub fn ask(socket: &Path, request: TraceRequest) -> Self {
        let stream = asked(socket, request);
        let replies = Arc::<Mutex<Vec<Value>>>::default();
        let reader = {
            let replies = Arc::clone(&replies);
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            std::thread::spawn(move || {
                for line in lines.map_while(Result::ok) {
                    let reply = serde_json::from_str(&line).unwrap();
                    replies.lock().unwrap().push(reply);
                }
            })
        };
        Self {
            stream,
            replies,
            reader: Some(reader),
        }
    }

    /// Returns the decisions so far.
    pub fn decisions(&self) -> Vec<Value> {
        let replies = self.replies.lock().unwrap();
        let told = replies.iter().filter(|it| it["reply"] == "trace");
        told.map(|it| it["data"].clone())
            .filter(|it| it["left_out"].is_null())
            .collect()
    }

    /// Returns the number of lines left out so far.
    pub fn left_out(&self) -> u64 {
        let replies = self.replies.lock().unwrap();
        let left_out = replies.iter().map(|it| it["data"]["left_out"].as_u64());
        left_out.flatten().sum()
    }

    /// Returns the reason if the agent refused the trace.
    pub fn refusal(&self) -> Option<String> {
        let replies = self.replies.lock().unwrap();
        let refusal = replies.iter().find(|it| it["reply"] == "error")?;
        Some(refusal["data"].as_str().unwrap().to_owned())
    }

    /// Waits for a decision of a program.
    pub fn expect(&self, program: &str, decision: &str) -> Value {
        wait_for(&format!("{program} {decision}"), || {
            self.decisions()
                .into_iter()
                .find(|it| it["program"] == program && it["decision"] == decision)
        })
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// Connects and requests a trace without reading it.
pub fn asked(socket: &Path, request: TraceRequest) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    let mut line = serde_json::to_vec(&request::Agent::Trace(request)).unwrap();
    line.push(b'\n');
    stream.write_all(&line).unwrap();
    stream
}

/// A running `roamcast trace`, killed on drop.
pub struct Program {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Program {
    /// Starts the program with these further arguments.
    pub fn start(socket: &Path, arguments: &[&str]) -> Self {
        let mut child = Command::new(lab::binaries::path("roamcast").unwrap())
            .arg("trace")
            .arg("--socket")
            .arg(socket)
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = Arc::<Mutex<Vec<String>>>::default();
        let out = BufReader::new(child.stdout.take().unwrap()).lines();
        std::thread::spawn({
            let lines = Arc::clone(&lines);
            move || {
                for line in out.map_while(Result::ok) {
                    lines.lock().unwrap().push(line);
                }
            }
        });
        Self { child, lines }
    }

    /// Waits for a line that contains all of these words.
    pub fn expect(&self, words: &[&str]) -> String {
        wait_for(&format!("a line with {words:?}"), || {
            let lines = self.lines.lock().unwrap();
            let mut found = lines.iter().filter(|line| {
                let of_line: Vec<_> = line.split_whitespace().collect();
                words.iter().all(|word| of_line.contains(word))
            });
            found.next().cloned()
        })
    }

    /// Returns the first line, if there is one.
    pub fn expect_any(&self) -> Option<String> {
        self.lines.lock().unwrap().first().cloned()
    }

    /// Sends the program a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Waits for the end of the program.
    pub fn end(&mut self) -> (ExitStatus, String) {
        let status = wait_for("end of the program", || self.child.try_wait().unwrap());
        let errors = self.child.stderr.take().unwrap();
        (status, std::io::read_to_string(errors).unwrap())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
