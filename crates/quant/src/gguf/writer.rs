//! Writing a GGUF file: the header tells all that follows, so names, shapes and types come first, then the tensors in their
//! order, each handed over by itself.

use std::collections::VecDeque;
use std::path::Path;

use super::{ALIGNMENT, Kind, MAGIC};
use crate::writer::AtomicFile;
use crate::{Error, Result};

/// A value of the metadata in the width in which llama.cpp wants it; it takes no other.
#[derive(Debug, Clone, PartialEq)]
pub enum Field {
    /// A size or an id.
    U32(u32),
    /// A number.
    F32(f32),
    /// A boolean.
    Bool(bool),
    /// Text.
    Str(String),
    /// Texts.
    Strs(Vec<String>),
    /// Whole numbers.
    I32s(Vec<i32>),
    /// Numbers.
    F32s(Vec<f32>),
}

impl Field {
    /// Type and value as the format has them.
    fn write(&self, out: &mut Vec<u8>) {
        let array = |out: &mut Vec<u8>, kind: u32, count: usize| {
            out.extend(9_u32.to_le_bytes());
            out.extend(kind.to_le_bytes());
            out.extend((count as u64).to_le_bytes());
        };
        match self {
            Self::U32(n) => {
                out.extend(4_u32.to_le_bytes());
                out.extend(n.to_le_bytes());
            }
            Self::F32(x) => {
                out.extend(6_u32.to_le_bytes());
                out.extend(x.to_le_bytes());
            }
            Self::Bool(yes) => {
                out.extend(7_u32.to_le_bytes());
                out.push((*yes).into());
            }
            Self::Str(text) => {
                out.extend(8_u32.to_le_bytes());
                string(out, text);
            }
            Self::Strs(all) => {
                array(out, 8, all.len());
                all.iter().for_each(|text| string(out, text));
            }
            Self::I32s(all) => {
                array(out, 5, all.len());
                out.extend(all.iter().flat_map(|n| n.to_le_bytes()));
            }
            Self::F32s(all) => {
                array(out, 6, all.len());
                out.extend(all.iter().flat_map(|x| x.to_le_bytes()));
            }
        }
    }
}

/// Its length, then its bytes.
fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// A tensor that will follow: llama.cpp's name, shape row-major, type.
pub type Planned = (String, Vec<usize>, Kind);

/// A file in the making. Dropped before [`GgufWriter::finish`], it leaves nothing behind.
#[derive(Debug)]
pub struct GgufWriter {
    file: AtomicFile,
    left: VecDeque<(String, u64)>,
    written: u64,
}

impl GgufWriter {
    /// Begins a file that will stand at `path`; writes its header, version 3.
    ///
    /// # Errors
    /// When nothing can be written there, or a tensor's type cannot be written or does not divide its rows.
    pub fn create(path: &Path, fields: &[(String, Field)], tensors: &[Planned]) -> Result<Self> {
        let mut head = MAGIC.to_vec();
        head.extend(3_u32.to_le_bytes());
        head.extend((tensors.len() as u64).to_le_bytes());
        head.extend((fields.len() as u64).to_le_bytes());
        for (key, value) in fields {
            string(&mut head, key);
            value.write(&mut head);
        }
        let (mut left, mut at) = (VecDeque::new(), 0_u64);
        for (name, shape, kind) in tensors {
            let bytes = kind.bytes_of(shape).ok_or_else(|| {
                Error::Request(format!("tensor {name}: {shape:?} cannot be written as {kind}"))
            })?;
            string(&mut head, name);
            head.extend((shape.len() as u32).to_le_bytes());
            head.extend(shape.iter().rev().flat_map(|dim| (*dim as u64).to_le_bytes()));
            head.extend(kind.number().to_le_bytes());
            head.extend(at.to_le_bytes());
            at += bytes.next_multiple_of(ALIGNMENT);
            left.push_back((name.clone(), bytes));
        }
        head.resize(head.len().next_multiple_of(ALIGNMENT as usize), 0);
        let mut file = AtomicFile::create_new(path)?;
        file.write(&head)?;
        Ok(Self { file, left, written: head.len() as u64 })
    }

    /// The next tensor's bytes.
    ///
    /// # Errors
    /// When there are more or fewer than the header says, or writing fails.
    pub fn add(&mut self, data: &[u8]) -> Result<()> {
        let next = self.left.pop_front().filter(|(_, bytes)| *bytes == data.len() as u64);
        let Some((_, bytes)) = next else {
            return Err(Error::Request(format!("{} bytes are not what the header says", data.len())));
        };
        let padded = bytes.next_multiple_of(ALIGNMENT);
        self.file.write(data)?;
        self.file.write(&vec![0; (padded - bytes) as usize])?;
        self.written += padded;
        Ok(())
    }

    /// The file takes its place. Its length in bytes.
    ///
    /// # Errors
    /// When a tensor is missing, when there has come to be a file, which is not replaced, or syncing or renaming fails.
    pub fn finish(self) -> Result<u64> {
        if let Some((name, _)) = self.left.front() {
            let what = format!("{}: tensor {name} was not written", self.file.path().display());
            return Err(Error::Request(what));
        }
        self.file.persist()?;
        Ok(self.written)
    }
}
