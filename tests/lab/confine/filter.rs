//! What a unit refuses by filters of system calls.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, anyhow};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use serde::{Deserialize, Serialize};

use super::{Unit, calls};

/// Flags of `clone` that make namespaces.
const NAMESPACES: [libc::c_int; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];
/// Families of sockets that our units name.
const FAMILIES: [(&str, libc::c_int); 5] = [
    ("AF_UNIX", libc::AF_UNIX),
    ("AF_INET", libc::AF_INET),
    ("AF_INET6", libc::AF_INET6),
    ("AF_NETLINK", libc::AF_NETLINK),
    ("AF_PACKET", libc::AF_PACKET),
];

/// System calls that may be refused as the unit refuses them, by an error: libnuma, which comes with
/// libvirt's library, tries this one when it is loaded, and does without.
const DISPENSABLE: [(&str, libc::c_long); 1] = [("set_mempolicy", libc::SYS_set_mempolicy)];

/// What is filtered.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Filter {
    /// System calls that are permitted; none for all.
    calls: Option<Vec<String>>,
    /// Families of sockets that are permitted; none for all.
    families: Option<Vec<libc::c_int>>,
    namespaces: bool,
    personality: bool,
    writable_code: bool,
}

impl Filter {
    pub(super) fn of(unit: &Unit) -> Result<Self> {
        let families = unit.words("RestrictAddressFamilies").into_iter();
        let families: Vec<libc::c_int> = families
            .map(|name| {
                let known = FAMILIES.iter().find(|(known, _)| *known == name);
                let (_, number) = known.with_context(|| format!("There is no {name}"))?;
                Ok(*number)
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            calls: calls::permitted(unit)?.map(|calls| calls.into_iter().collect()),
            families: (!families.is_empty()).then_some(families),
            namespaces: !unit.is_set("RestrictNamespaces"),
            personality: !unit.is_set("LockPersonality"),
            writable_code: !unit.is_set("MemoryDenyWriteExecute"),
        })
    }

    /// For this process, and what it executes.
    pub(super) fn apply(&self) -> Result<()> {
        if let Some(families) = &self.families {
            let others = families.iter().map(|family| {
                let family = u64::from(family.cast_unsigned());
                condition(0, SeccompCmpOp::Ne, family)
            });
            let rule = SeccompRule::new(others.collect::<Result<_>>()?)?;
            refuse([(libc::SYS_socket, vec![rule])].into(), libc::EAFNOSUPPORT)?;
        }
        refuse(self.refused()?, libc::EPERM)?;
        if !self.namespaces {
            // Its flags are in memory, which no filter sees; the caller takes `clone` then.
            refuse([(libc::SYS_clone3, Vec::new())].into(), libc::ENOSYS)?;
        }
        let Some(calls) = &self.calls else {
            return Ok(());
        };
        // Refused by an error first, and then permitted by what would kill.
        let dispensable = || {
            let refused = |name: &str| !calls.iter().any(|call| call == name);
            DISPENSABLE.iter().filter(move |(name, _)| refused(name))
        };
        let rules = dispensable().map(|(_, number)| (*number, Vec::new()));
        refuse(rules.collect(), libc::EPERM)?;
        let names = dispensable().map(|(name, _)| (*name).to_owned());
        let permitted: Vec<String> = calls.iter().cloned().chain(names).collect();
        apply(&permit(&permitted)?)
    }

    fn refused(&self) -> Result<BTreeMap<libc::c_long, Vec<SeccompRule>>> {
        let mut refused = BTreeMap::new();
        if !self.writable_code {
            let both = libc::PROT_WRITE | libc::PROT_EXEC;
            refused.insert(libc::SYS_mmap, vec![with_all(2, both)?]);
            for call in [libc::SYS_mprotect, libc::SYS_pkey_mprotect] {
                refused.insert(call, vec![with_all(2, libc::PROT_EXEC)?]);
            }
        }
        if !self.namespaces {
            let flags = || NAMESPACES.into_iter().map(|flag| with_all(0, flag));
            refused.insert(libc::SYS_clone, flags().collect::<Result<_>>()?);
            refused.insert(libc::SYS_unshare, flags().collect::<Result<_>>()?);
            refused.insert(libc::SYS_setns, Vec::new());
        }
        if !self.personality {
            let other = condition(0, SeccompCmpOp::Ne, 0)?;
            refused.insert(libc::SYS_personality, vec![SeccompRule::new(vec![other])?]);
        }
        Ok(refused)
    }
}

fn condition(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompCondition> {
    let length = SeccompCmpArgLen::Dword;
    Ok(SeccompCondition::new(argument, length, operator, value)?)
}

/// An argument that has all of these flags.
fn with_all(argument: u8, flags: libc::c_int) -> Result<SeccompRule> {
    let flags = u64::from(flags.cast_unsigned());
    let condition = condition(argument, SeccompCmpOp::MaskedEq(flags), flags)?;
    Ok(SeccompRule::new(vec![condition])?)
}

fn refuse(rules: BTreeMap<libc::c_long, Vec<SeccompRule>>, errno: libc::c_int) -> Result<()> {
    if rules.is_empty() {
        return Ok(());
    }
    let action = SeccompAction::Errno(errno.cast_unsigned());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, action, architecture()?)?;
    apply(&BpfProgram::try_from(filter)?)
}

/// A program that kills whoever makes another system call.
fn permit(calls: &[String]) -> Result<BpfProgram> {
    // systemd names calls of all architectures.
    let known: Vec<&String> = calls
        .iter()
        .filter(|call| compile(&[call]).is_ok())
        .collect();
    compile(&known)
}

fn compile(calls: &[&String]) -> Result<BpfProgram> {
    let calls: Vec<_> = calls
        .iter()
        .map(|call| serde_json::json!({"syscall": call}))
        .collect();
    let text = serde_json::json!({"calls": {
        "mismatch_action": "kill_process",
        "match_action": "allow",
        "filter": calls,
    }});
    let programs = seccompiler::compile_from_json(text.to_string().as_bytes(), architecture()?)?;
    let program = programs.into_values().next();
    program.context("The filter of system calls is empty")
}

fn architecture() -> Result<TargetArch> {
    let name = std::env::consts::ARCH;
    TargetArch::try_from(name)
        .map_err(|_| anyhow!("No filters of system calls are made for {name}"))
}

fn apply(program: &BpfProgram) -> Result<()> {
    seccompiler::apply_filter(program).context("The kernel refuses a filter of system calls")
}
