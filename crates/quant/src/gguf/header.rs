//! Reading a GGUF header: every length is checked against what is left before a byte of it is taken.

use std::fs::File;
use std::io::{BufReader, Read as _};
use std::path::Path;

use super::{Kind, TensorInfo, Value};
use crate::{Error, Result};

/// No header that is meant well is longer; a vocabulary of a million tokens takes a tenth.
const MAX_HEADER: u64 = 256 << 20;
/// Arrays of arrays go this deep, so that a file cannot exhaust the stack.
const MAX_DEPTH: usize = 4;

/// The header while it is read.
pub(super) struct Header<'a> {
    path: &'a Path,
    reader: BufReader<File>,
    position: u64,
    length: u64,
}

impl<'a> Header<'a> {
    /// A header at the start of a file of `length` bytes.
    pub(super) fn new(path: &'a Path, file: File, length: u64) -> Self {
        Self { path, reader: BufReader::new(file), position: 0, length }
    }

    /// How many bytes were read.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    pub(super) fn damaged(&self, what: String) -> Error {
        Error::Damaged { file: self.path.to_path_buf(), what }
    }

    /// Takes `count` bytes for `field`, if the file and the header have as many left.
    fn claim(&mut self, count: u64, field: &str) -> Result<()> {
        let left = self.length.min(MAX_HEADER).saturating_sub(self.position);
        if count > left {
            let what = format!("{field} at byte {} needs {count} bytes, {left} are left", self.position);
            return Err(self.damaged(what));
        }
        self.position += count;
        Ok(())
    }

    pub(super) fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N]> {
        self.claim(N as u64, field)?;
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes).map_err(Error::io(self.path))?;
        Ok(bytes)
    }

    pub(super) fn u32(&mut self, field: &str) -> Result<u32> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, field: &str) -> Result<u64> {
        self.array(field).map(u64::from_le_bytes)
    }

    pub(super) fn string(&mut self, field: &str) -> Result<String> {
        let count = self.u64(field)?;
        self.claim(count, field)?;
        let mut bytes = vec![0; usize::try_from(count).unwrap_or(0)];
        self.reader.read_exact(&mut bytes).map_err(Error::io(self.path))?;
        String::from_utf8(bytes).map_err(|_| self.damaged(format!("{field} is not valid UTF-8")))
    }

    pub(super) fn value(&mut self, kind: u32, key: &str, depth: usize) -> Result<Value> {
        Ok(match kind {
            0 => Value::U64(u8::from_le_bytes(self.array(key)?).into()),
            1 => Value::I64(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::U64(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::I64(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::U64(self.u32(key)?.into()),
            5 => Value::I64(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::F64(f32::from_le_bytes(self.array(key)?).into()),
            7 => match self.array(key)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(self.damaged(format!("{key}: expected 0 or 1, found {other}"))),
            },
            8 => Value::Str(self.string(key)?),
            9 if depth < MAX_DEPTH => {
                let inner = self.u32(key)?;
                let count = self.u64(key)?;
                // Nothing is reserved: a false count runs into the end of the header, one value at a time.
                let mut values = Vec::new();
                for _ in 0..count {
                    values.push(self.value(inner, key, depth + 1)?);
                }
                Value::Array(values)
            }
            9 => return Err(self.damaged(format!("{key}: arrays nested deeper than {MAX_DEPTH}"))),
            10 => Value::U64(self.u64(key)?),
            11 => Value::I64(i64::from_le_bytes(self.array(key)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(key)?)),
            other => return Err(self.damaged(format!("{key}: there is no value of type {other}"))),
        })
    }

    /// One tensor's entry, its offset still relative to the data.
    pub(super) fn tensor(&mut self, i: u64, count: u64) -> Result<TensorInfo> {
        let name = self.string(&format!("name of tensor {i} of {count}"))?;
        let field = format!("tensor {name}");
        let dims = self.u32(&field)?;
        if dims > 4 {
            return Err(self.damaged(format!("{field}: expected at most 4 dimensions, found {dims}")));
        }
        let mut shape = Vec::new();
        for _ in 0..dims {
            let dim = self.u64(&field)?;
            let dim = usize::try_from(dim).ok().filter(|d| i32::try_from(*d).is_ok());
            shape.push(dim.ok_or_else(|| self.damaged(format!("{field}: a dimension is too large")))?);
        }
        shape.reverse();
        let kind = Kind::from_number(self.u32(&field)?);
        let offset = self.u64(&field)?;
        let bytes = match kind.block() {
            None => 0,
            Some((weights, bytes)) => {
                let inputs = shape.last().copied().unwrap_or(1);
                if !inputs.is_multiple_of(weights) {
                    let what = format!("{field}: rows of {inputs} weights in blocks of {weights} ({kind})");
                    return Err(self.damaged(what));
                }
                let total = shape.iter().try_fold(1_usize, |product, &dim| product.checked_mul(dim));
                let total = total.and_then(|total| (total / weights).checked_mul(bytes));
                total.ok_or_else(|| self.damaged(format!("{field}: shape {shape:?} is too large")))? as u64
            }
        };
        Ok(TensorInfo { name, shape, kind, offset, bytes })
    }
}
