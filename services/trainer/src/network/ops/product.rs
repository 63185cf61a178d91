//! Matrix products over slices, in place.

use gemm::Parallelism;

/// A row-major matrix, perhaps part of a wider one, perhaps transposed.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

/// How a product meets what stands in the destination already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Into {
    Overwrite,
    Add,
}

/// Threads of one product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// The caller's alone: it is one of many that run at the same time.
    One,
    All,
}

// === impl Matrix ===

impl<'a> Matrix<'a> {
    pub fn new(values: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::part(values, rows, columns, columns)
    }

    /// `rows` × `columns` out of rows of `stride` numbers.
    pub fn part(values: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        let needed = if rows == 0 { 0 } else { (rows - 1) * stride + columns };
        assert!(columns <= stride && values.len() >= needed, "{rows} × {columns} of {}", values.len());
        Self { values, rows, columns, row_stride: stride, column_stride: 1 }
    }

    pub fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// into = scale · left × right (+ into); `into` is row-major with rows of `stride` numbers.
///
/// The order of each sum depends on the shapes alone, so that equal arguments give equal bits.
pub fn multiply(
    left: Matrix<'_>,
    right: Matrix<'_>,
    scale: f32,
    (into, stride): (&mut [f32], usize),
    how: Into,
    threads: Threads,
) {
    let (rows, columns, depth) = (left.rows, right.columns, left.columns);
    assert_eq!(depth, right.rows);
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(columns <= stride && into.len() >= (rows - 1) * stride + columns);
    let parallelism = match threads {
        Threads::One => Parallelism::None,
        Threads::All => Parallelism::Rayon(rayon::current_num_threads()),
    };
    // SAFETY: the assertions here and in `Matrix::part` keep every element that the strides reach inside its slice,
    // and `into` is borrowed mutably, so that nothing overlaps it.
    unsafe {
        gemm::gemm(
            rows,
            columns,
            depth,
            into.as_mut_ptr(),
            1,
            stride as isize,
            how == Into::Add,
            left.values.as_ptr(),
            left.column_stride as isize,
            left.row_stride as isize,
            right.values.as_ptr(),
            right.column_stride as isize,
            right.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_parts_and_transposes() {
        let left: Vec<f32> = (0..6).map(|x| x as f32).collect(); // 2 × 3
        let right: Vec<f32> = (0..8).map(|x| x as f32 - 3.0).collect(); // 2 × 4
        let mut into = vec![100.0; 15]; // 3 × 5, of which the first four columns are written
        let (a, b) = (Matrix::new(&left, 2, 3).transposed(), Matrix::new(&right, 2, 4));
        multiply(a, b, 2.0, (&mut into, 5), Into::Overwrite, Threads::One);
        multiply(a, b, 1.0, (&mut into, 5), Into::Add, Threads::All);
        for row in 0..3 {
            for column in 0..4 {
                let expected: f32 = (0..2).map(|k| left[k * 3 + row] * right[k * 4 + column]).sum();
                assert_eq!(into[row * 5 + column], 3.0 * expected);
            }
        }
        assert!((0..3).all(|row| into[row * 5 + 4] == 100.0));
    }
}
