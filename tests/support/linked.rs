//! Instructions of a kernel program as the kernel receives them, checked as old verifiers do.
//!
//! The functions that a program calls follow the program, as the loader links them. Each check
//! follows the verifier of Linux 6.1, the strictest that the programs must pass.

use std::collections::{BTreeSet, HashSet};

use aya_obj::generated::bpf_insn;
use aya_obj::{Function, Object};

/// `BPF_CLASS(code)`: the low three bits.
const LDX: u8 = 0x01;
const ST: u8 = 0x02;
const STX: u8 = 0x03;
const JMP: u8 = 0x05;
const JMP32: u8 = 0x06;
const ALU64: u8 = 0x07;
/// `BPF_OP(code)`: the high four bits.
const ADD: u8 = 0x00;
const MOV: u8 = 0xb0;
const JA: u8 = 0x00;
const CALL: u8 = 0x80;
const EXIT: u8 = 0x90;
/// `BPF_SRC(code)`: the operand is a register.
const X: u8 = 0x08;
/// `BPF_LD | BPF_IMM | BPF_DW`, which takes two instructions.
const LD_IMM64: u8 = 0x18;
const PSEUDO_CALL: u8 = 1;
const PSEUDO_FUNC: u8 = 4;
/// Register with the end of the stack frame.
const FRAME_POINTER: u8 = 10;
/// Unit to which the verifier rounds up each frame, bytes.
const FRAME_UNIT: usize = 32;

/// A program with all functions that it can reach.
pub struct Linked {
    /// Name of the program.
    pub name: String,
    instructions: Vec<bpf_insn>,
    /// First instruction of each function, ascending; the program itself starts at 0.
    functions: Vec<usize>,
    /// Function names with their instruction bytes, as in the object.
    names: Vec<(String, Vec<u8>)>,
}

impl Linked {
    /// Returns all programs of an object.
    pub fn all(elf: &[u8]) -> Vec<Self> {
        let mut object = Object::parse(elf).expect("the object can be read");
        let names: Vec<_> = object
            .functions
            .values()
            .map(|function| (function.name.clone(), codes(&function.instructions)))
            .collect();
        let sections: HashSet<usize> = object.functions.keys().map(|key| key.0).collect();
        object
            .relocate_calls(&sections)
            .expect("calls can be linked");
        let linked = |(name, program): (&String, &aya_obj::Program)| {
            Self::new(name, &object.functions[&program.function_key()], &names)
        };
        object.programs.iter().map(linked).collect()
    }

    fn new(name: &str, function: &Function, names: &[(String, Vec<u8>)]) -> Self {
        let instructions = function.instructions.clone();
        let mut functions: BTreeSet<usize> = [0].into();
        functions.extend((0..instructions.len()).filter_map(|at| callee(&instructions, at)));
        Self {
            name: name.to_owned(),
            instructions,
            functions: functions.into_iter().collect(),
            names: names.to_vec(),
        }
    }

    /// Returns the number of instructions of the program and its functions.
    pub fn instruction_count(&self) -> usize {
        self.instructions.len()
    }

    /// Returns the loops that a fall-through closes instead of a jump; `check_cfg` of old kernels
    /// refuses them.
    pub fn fall_through_back_edges(&self) -> Vec<String> {
        #[derive(Clone, Copy, PartialEq)]
        enum State {
            New,
            OnPath,
            Explored,
        }
        let mut found = Vec::new();
        let mut states = vec![State::New; self.instruction_count()];
        // The instructions from the start to the current one, each with its remaining edges.
        let mut path = vec![(0, self.edges(0))];
        states[0] = State::OnPath;
        while let Some((at, edges)) = path.last_mut() {
            let at = *at;
            if edges.is_empty() {
                states[at] = State::Explored;
                path.pop();
                continue;
            }
            let edge = edges.remove(0);
            match states[edge.to] {
                State::New => {
                    states[edge.to] = State::OnPath;
                    path.push((edge.to, self.edges(edge.to)));
                }
                State::OnPath if !edge.may_close_a_loop => found.push(format!(
                    "{}: instruction {at} falls through to {}",
                    self.function_of(at),
                    edge.to
                )),
                State::OnPath | State::Explored => {}
            }
        }
        found
    }

    /// Returns the edges of the control flow in the order in which `check_cfg` follows them.
    fn edges(&self, at: usize) -> Vec<Edge> {
        let insn = &self.instructions[at];
        let next = |may_close_a_loop| Edge {
            to: at + 1,
            may_close_a_loop,
        };
        let branch = Edge {
            to: at.wrapping_add_signed(1 + isize::from(insn.off)),
            may_close_a_loop: true,
        };
        let callee = callee(&self.instructions, at).map(|to| Edge {
            to,
            may_close_a_loop: insn.code == LD_IMM64,
        });
        if !matches!(insn.code & 7, JMP | JMP32) {
            return std::iter::once(next(false)).chain(callee).collect();
        }
        match insn.code & 0xf0 {
            EXIT => Vec::new(),
            CALL => std::iter::once(next(false)).chain(callee).collect(),
            JA => vec![branch],
            _ => vec![next(true), branch],
        }
    }

    /// Returns the deepest call chain, callbacks included: its stack bytes, rounded per frame as
    /// old kernels do, and its functions with their frames.
    pub fn deepest_stack(&self) -> (usize, String) {
        self.deepest_from(0)
    }

    fn deepest_from(&self, function: usize) -> (usize, String) {
        let frame = self.frame_bytes(function);
        let rounded = frame.max(1).next_multiple_of(FRAME_UNIT);
        let own = format!("{} {frame}", self.function_of(self.functions[function]));
        let deepest = self
            .range(function)
            .filter_map(|at| callee(&self.instructions, at))
            .map(|to| self.deepest_from(self.index_of(to)))
            .max_by_key(|(bytes, _)| *bytes);
        match deepest {
            None => (rounded, own),
            Some((bytes, chain)) => (rounded + bytes, format!("{own}, {chain}")),
        }
    }

    /// Returns the stack bytes that a function accesses, through the frame pointer or through a
    /// copy that it lowers.
    fn frame_bytes(&self, function: usize) -> usize {
        let mut deepest: i32 = 0;
        let mut copies = [false; 11];
        for at in self.range(function) {
            let insn = &self.instructions[at];
            let (class, op) = (insn.code & 7, insn.code & 0xf0);
            let (to, from) = (usize::from(insn.dst_reg()), insn.src_reg());
            match class {
                LDX if from == FRAME_POINTER => deepest = deepest.min(insn.off.into()),
                ST | STX if insn.dst_reg() == FRAME_POINTER => {
                    deepest = deepest.min(insn.off.into());
                }
                ALU64 if op == ADD && insn.code & X == 0 && copies[to] => {
                    deepest = deepest.min(insn.imm);
                }
                _ => {}
            }
            // A computed address is not lowered again, so its register no longer holds a plain
            // copy.
            if matches!(class, LDX | ALU64) || insn.code == LD_IMM64 {
                copies[to] = class == ALU64 && op == MOV && insn.code & X != 0 && {
                    from == FRAME_POINTER || copies[usize::from(from)]
                };
            }
        }
        usize::try_from(-deepest).unwrap_or(0)
    }

    fn range(&self, function: usize) -> std::ops::Range<usize> {
        let end = self.functions.get(function + 1).copied();
        self.functions[function]..end.unwrap_or(self.instruction_count())
    }

    fn index_of(&self, at: usize) -> usize {
        self.functions.partition_point(|start| *start <= at) - 1
    }

    /// Returns the name of the function that contains an instruction.
    fn function_of(&self, at: usize) -> &str {
        let own = codes(&self.instructions[self.range(self.index_of(at))]);
        self.names
            .iter()
            .find(|(_, codes)| *codes == own)
            .map_or("function", |(name, _)| name)
    }
}

struct Edge {
    to: usize,
    /// Whether the verifier treats the edge as one that may lead back.
    may_close_a_loop: bool,
}

/// Returns the function that an instruction calls, or whose address it loads for a helper's
/// callback.
fn callee(instructions: &[bpf_insn], at: usize) -> Option<usize> {
    let insn = &instructions[at];
    let calls = insn.code == JMP | CALL && insn.src_reg() == PSEUDO_CALL;
    let names = insn.code == LD_IMM64 && insn.src_reg() == PSEUDO_FUNC;
    (calls || names).then(|| at.wrapping_add_signed(1 + insn.imm as isize))
}

fn codes(instructions: &[bpf_insn]) -> Vec<u8> {
    instructions.iter().map(|insn| insn.code).collect()
}
