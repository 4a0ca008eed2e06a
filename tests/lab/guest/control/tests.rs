//! Tests of [`super`], with a thread instead of a guest.

use std::io::Write as _;

use super::*;
use crate::guest::wire::{Record, Reply, frame::frame};

const DEADLINE: Duration = Duration::from_secs(20);

struct FakeGuest {
    stream: UnixStream,
    decoder: Decoder,
}

impl FakeGuest {
    fn connect(path: &std::path::Path) -> Self {
        Self {
            stream: UnixStream::connect(path).unwrap(),
            decoder: Decoder::default(),
        }
    }

    fn send(&mut self, number: u32, message: &FromGuest) {
        let (kind, payload) = message.encode().unwrap();
        self.stream
            .write_all(&frame(
                kind,
                number,
                u64::from(number) * 10_000_000,
                &payload,
            ))
            .unwrap();
    }

    fn request(&mut self) -> Request {
        self.stream.set_read_timeout(Some(DEADLINE)).unwrap();
        loop {
            if let Some(frame) = self.decoder.poll_frame() {
                return Request::decode(&frame).unwrap();
            }
            let mut buffer = [0; 4096];
            let length = self.stream.read(&mut buffer).unwrap();
            assert_ne!(length, 0, "The channel was closed");
            self.decoder.push(&buffer[..length]);
        }
    }
}

fn channel() -> (tempfile::TempDir, [PathBuf; 2], Control) {
    let directory = tempfile::tempdir().unwrap();
    let paths = ["vms1", "vms2"].map(|host| directory.path().join(host));
    let sockets: Vec<_> = ["vms1", "vms2"]
        .iter()
        .zip(&paths)
        .map(|(host, path)| HostSocket {
            host: (*host).to_owned(),
            path: path.clone(),
        })
        .collect();
    let control = Control::listen(&sockets).unwrap();
    (directory, paths, control)
}

fn records(sequence: u32) -> FromGuest {
    FromGuest::Records(1, vec![Record { flow: 0, sequence }])
}

fn sequences(control: &Control) -> Vec<u32> {
    control
        .arrivals(1)
        .iter()
        .map(|arrival| arrival.sequence)
        .collect()
}

#[test]
fn unanswered_request_is_repeated_under_the_same_id() {
    let (_directory, [path, _], control) = channel();
    let mut guest = FakeGuest::connect(&path);
    let caller = thread::spawn(move || control.request(Command::StopReceiver { receiver: 1 }));
    let first = guest.request();
    let second = guest.request();
    assert_eq!(first, second);
    guest.send(
        0,
        &FromGuest::Reply(Reply {
            id: first.id,
            result: Err("No such".into()),
        }),
    );
    let error = caller.join().unwrap().unwrap_err();
    assert_eq!(error.to_string(), "The guest refused: No such");
}

#[test]
fn frame_cut_by_the_switch_over_is_asked_for_again() {
    let (_directory, [source, destination], control) = channel();
    let mut source = FakeGuest::connect(&source);
    source.send(0, &records(0));
    let (kind, payload) = records(1).encode().unwrap();
    let bytes = frame(kind, 1, 10_000_000, &payload);
    source.stream.write_all(&bytes[..10]).unwrap();
    control.wait_host("vms1", DEADLINE).unwrap();

    let mut destination = FakeGuest::connect(&destination);
    destination.stream.write_all(&bytes[10..]).unwrap();
    destination.send(2, &records(2));
    assert_eq!(
        destination.request().command,
        Command::Resend { from: 1, to: 2 }
    );
    destination.send(1, &records(1));
    destination.send(1, &records(1));
    destination.send(3, &records(3));
    control.wait_arrivals(1, 4, DEADLINE).unwrap();
    // The packets are in the order in which the guest got them.
    assert_eq!(sequences(&control), [0, 1, 2, 3]);
    assert_eq!(control.host().as_deref(), Some("vms2"));
    let stats = control.stats();
    assert_eq!((stats.missing, stats.recovered), (0, 1));
}

#[test]
fn numbers_start_over_after_a_reboot() {
    let (_directory, [path, _], control) = channel();
    let mut guest = FakeGuest::connect(&path);
    guest.send(0, &FromGuest::Hello("first".into()));
    guest.send(1, &records(0));
    guest.send(0, &FromGuest::Hello("second".into()));
    guest.send(1, &records(1));
    guest.send(2, &records(2));
    control.wait_arrivals(1, 2, DEADLINE).unwrap();
    assert_eq!(control.stats().missing, 0);
    // The report before the reboot used another clock, so it is gone.
    assert_eq!(sequences(&control), [1, 2]);
}

#[test]
fn program_output_comes_line_by_line_with_its_end() {
    let (_directory, [path, _], control) = channel();
    let mut guest = FakeGuest::connect(&path);
    let caller = thread::spawn(move || {
        let mut program = control.spawn("migkick", &["go", "vms2"]).unwrap();
        let first = program.next_line(DEADLINE).unwrap().unwrap();
        (first.text, program.wait(DEADLINE).unwrap().code)
    });
    let id = guest.request().id;
    guest.send(
        0,
        &FromGuest::Reply(Reply {
            id,
            result: Ok(Answer::Done),
        }),
    );
    guest.send(1, &FromGuest::Output(id, false, b"Agent found\n".to_vec()));
    guest.send(2, &FromGuest::Exit(id, 1));
    assert_eq!(caller.join().unwrap(), ("Agent found".to_owned(), Some(1)));
}
