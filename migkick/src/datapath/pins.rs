//! Pins of the maps and links, which outlive the daemon.
//!
//! ```text
//! /sys/fs/bpf/migkick/
//!   v2/                      layout version
//!     NODE .. MAT_COUNTERS   maps
//!     mat_out-7, mat_in-2    TCX link of the program on the interface with that index
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use aya::programs::{SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use common::mat::maps::LAYOUT_VERSION;
use linux::bpf::link::{self, AttachError, Interface, Tcx};
use linux::bpf::pins::{self, Lock, PinError};
use nix::mount::{MsFlags, mount};

use super::{DatapathError, load_error, object};

const BPF_FS: &str = "/sys/fs/bpf";
const ROOT: &str = "/sys/fs/bpf/migkick";

/// Names of all maps in the object file.
const MAPS: [&str; 7] = [
    "NODE",
    "NODE_SLOT",
    "PEERS",
    "PEER_MOAS",
    "OWN_MOAS",
    "HELD",
    "MAT_COUNTERS",
];

/// A program in the object file, by its direction.
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

/// The pin directory, locked by this process.
pub(super) struct Pins {
    directory: PathBuf,
    _lock: Lock,
}

impl Pins {
    pub(super) fn open() -> Result<Self, DatapathError> {
        if !pins::is_on_bpf_fs(Path::new(BPF_FS)) {
            // Some init systems do not mount bpffs.
            let none = None::<&str>;
            mount(none, BPF_FS, Some("bpf"), MsFlags::empty(), none)
                .map_err(|error| PinError::of(Path::new(BPF_FS))(error.into()))?;
        }
        let root = Path::new(ROOT);
        let directory = pins::directory_of(root, LAYOUT_VERSION);
        pins::create_directory(&directory)?;
        for directory in [root, &directory] {
            pins::check_owner(directory, false)?;
        }
        Ok(Self {
            _lock: Lock::take(root, LAYOUT_VERSION)?,
            directory,
        })
    }

    /// Creates or adopts all maps, and loads the programs.
    pub(super) fn load(&self) -> Result<Ebpf, DatapathError> {
        let mut loader = EbpfLoader::new();
        for name in MAPS {
            loader.map_pin_path(name, self.directory.join(name));
        }
        let mut ebpf = loader
            .load(object::GUEST)
            .map_err(|error| load_error("the maps", &error))?;
        for program in Program::ALL {
            classifier(&mut ebpf, program)?
                .load()
                .map_err(|error| load_error(program.name(), &error))?;
        }
        Ok(ebpf)
    }

    /// Attaches a program, or replaces the program in a pinned link.
    pub(super) fn attach(
        &self,
        ebpf: &mut Ebpf,
        program: Program,
        ifindex: u32,
        name: &str,
    ) -> Result<(), DatapathError> {
        let pin = self.link(program, ifindex);
        let mut tcx = Tcx {
            program: classifier(ebpf, program)?,
            side: program.hook(),
        };
        let interface = Interface {
            index: ifindex,
            name,
        };
        match link::attach(&mut tcx, interface, &pin) {
            Ok(_) => Ok(()),
            Err(AttachError::Pin(error)) => Err(error.into()),
            Err(AttachError::Refused(refused)) => Err(DatapathError::Attach {
                program: program.name(),
                interface: name.to_owned(),
                reason: refused.to_string(),
            }),
        }
    }

    /// Detaches a program at once, and removes the pin. A missing pin is no error.
    pub(super) fn detach(&self, program: Program, ifindex: u32) -> Result<(), DatapathError> {
        Ok(pins::remove_link(&self.link(program, ifindex))?)
    }

    /// Detaches all programs and removes all pins.
    pub(super) fn clear(&self) -> Result<(), DatapathError> {
        for link in pins::links(&self.directory)? {
            pins::remove_link(&link.path)?;
        }
        for entry in fs::read_dir(&self.directory)
            .map_err(PinError::of(&self.directory))?
            .flatten()
        {
            let path = entry.path();
            fs::remove_file(&path).map_err(PinError::of(&path))?;
        }
        Ok(())
    }

    fn link(&self, program: Program, ifindex: u32) -> PathBuf {
        pins::link(&self.directory, program.name(), ifindex)
    }
}

fn classifier(ebpf: &mut Ebpf, program: Program) -> Result<&mut SchedClassifier, DatapathError> {
    let name = program.name();
    ebpf.program_mut(name)
        .and_then(|program| program.try_into().ok())
        .ok_or(DatapathError::Layout { name })
}
