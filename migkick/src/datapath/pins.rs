//! Where maps and links are pinned, so that they outlive the daemon.
//!
//! ```text
//! /sys/fs/bpf/migkick/
//!   v1/                      layout version
//!     NODE .. MAT_COUNTERS   maps
//!     mat_out-7, mat_in-2    TCX link of the program on the interface with that index
//! ```
//!
//! Pins of another layout version are removed: their programs would do the work twice.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use common::mat::maps::LAYOUT_VERSION;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::{DatapathError, load_error, object, sys};

const BPF_FS: &str = "/sys/fs/bpf";
const ROOT: &str = "/sys/fs/bpf/migkick";

/// All maps.
const MAPS: [&str; 7] = [
    "NODE",
    "NODE_SLOT",
    "PEERS",
    "PEER_MOAS",
    "OWN_MOAS",
    "HELD",
    "MAT_COUNTERS",
];

/// The programs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Program {
    Out,
    In,
}

impl Program {
    pub(super) const ALL: [Self; 2] = [Self::Out, Self::In];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Out => "mat_out",
            Self::In => "mat_in",
        }
    }

    fn hook(self) -> TcAttachType {
        match self {
            Self::Out => TcAttachType::Egress,
            Self::In => TcAttachType::Ingress,
        }
    }
}

/// The pin directory, locked for this process.
pub(super) struct Pins {
    directory: PathBuf,
    _lock: Flock<File>,
}

impl Pins {
    pub(super) fn open() -> Result<Self, DatapathError> {
        let on_bpffs = statfs(BPF_FS).is_ok_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC);
        if !on_bpffs {
            // Where no init system has done so.
            let none = None::<&str>;
            mount(none, BPF_FS, Some("bpf"), MsFlags::empty(), none)
                .map_err(|error| pin_error(Path::new(BPF_FS))(error.into()))?;
        }
        let root = Path::new(ROOT);
        let own = format!("v{LAYOUT_VERSION}");
        let directory = root.join(&own);
        fs::create_dir_all(&directory).map_err(pin_error(&directory))?;
        let file = File::open(root).map_err(pin_error(root))?;
        let lock =
            Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| DatapathError::InUse)?;
        for entry in fs::read_dir(root).map_err(pin_error(root))?.flatten() {
            if entry.file_name() != own.as_str() {
                let path = entry.path();
                fs::remove_dir_all(&path).map_err(pin_error(&path))?;
            }
        }
        Ok(Self {
            directory,
            _lock: lock,
        })
    }

    /// Makes or adopts all maps, and loads the programs.
    pub(super) fn load(&self) -> Result<Ebpf, DatapathError> {
        let mut loader = EbpfLoader::new();
        for name in MAPS {
            loader.map_pin_path(name, self.directory.join(name));
        }
        let mut ebpf = loader
            .load(object::GUEST)
            .map_err(|error| load_error(&error))?;
        for program in Program::ALL {
            classifier(&mut ebpf, program)?
                .load()
                .map_err(|error| load_error(&error))?;
        }
        Ok(ebpf)
    }

    /// Attaches a program, or exchanges the one in the link that is pinned.
    pub(super) fn attach(
        &self,
        ebpf: &mut Ebpf,
        program: Program,
        ifindex: u32,
        name: &str,
    ) -> Result<(), DatapathError> {
        let failed = |error: &dyn std::error::Error| DatapathError::Attach {
            program: program.name(),
            interface: name.to_owned(),
            reason: chain(error),
        };
        let path = self.link(program, ifindex);
        let classifier = classifier(ebpf, program)?;
        if path.exists() {
            if exchange(&path, classifier).is_ok() {
                return Ok(());
            }
            // The interface it belonged to is gone and its index in use again.
            self.detach(program, ifindex)?;
        }
        if nix::net::if_::if_nametoindex(name) != Ok(ifindex) {
            return Err(failed(&io::Error::from(io::ErrorKind::NotFound)));
        }
        let link = classifier
            .attach_with_options(
                name,
                program.hook(),
                TcAttachOptions::TcxOrder(LinkOrder::first()),
            )
            .and_then(|id| classifier.take_link(id))
            .map_err(|error| failed(&error))?;
        FdLink::try_from(link)
            .map_err(|error| failed(&error))?
            .pin(&path)
            .map_err(|error| failed(&error))?;
        Ok(())
    }

    /// Detaches a program at once, and removes the pin; one that is not there is fine.
    pub(super) fn detach(&self, program: Program, ifindex: u32) -> Result<(), DatapathError> {
        remove_link(&self.link(program, ifindex))
    }

    /// Detaches all programs and removes all pins.
    pub(super) fn clear(&self) -> Result<(), DatapathError> {
        for entry in fs::read_dir(&self.directory)
            .map_err(pin_error(&self.directory))?
            .flatten()
        {
            let path = entry.path();
            if path
                .file_name()
                .is_some_and(|name| is_link(&name.to_string_lossy()))
            {
                remove_link(&path)?;
            } else {
                fs::remove_file(&path).map_err(pin_error(&path))?;
            }
        }
        Ok(())
    }

    fn link(&self, program: Program, ifindex: u32) -> PathBuf {
        self.directory.join(format!("{}-{ifindex}", program.name()))
    }
}

fn is_link(name: &str) -> bool {
    Program::ALL.iter().any(|it| {
        name.strip_prefix(it.name())
            .is_some_and(|rest| rest.starts_with('-'))
    })
}

fn exchange(
    path: &Path,
    classifier: &mut SchedClassifier,
) -> Result<(), Box<dyn std::error::Error>> {
    let link = FdLink::from(PinnedLink::from_pin(path)?);
    let id = classifier.attach_to_link(SchedClassifierLink::try_from(link)?)?;
    // The pin keeps the link; this descriptor is not needed.
    drop(classifier.take_link(id)?);
    Ok(())
}

fn remove_link(path: &Path) -> Result<(), DatapathError> {
    // Fails where the interface is gone; the link goes with its pin anyway.
    let _ = sys::detach_link(path);
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(pin_error(path)(error)),
        _ => Ok(()),
    }
}

fn classifier(ebpf: &mut Ebpf, program: Program) -> Result<&mut SchedClassifier, DatapathError> {
    let name = program.name();
    ebpf.program_mut(name)
        .and_then(|program| program.try_into().ok())
        .ok_or(DatapathError::Layout { name })
}

fn pin_error(path: &Path) -> impl FnOnce(io::Error) -> DatapathError + use<> {
    let path = path.to_owned();
    move |source| DatapathError::Pin { path, source }
}

/// An error with its causes, which aya keeps apart.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
