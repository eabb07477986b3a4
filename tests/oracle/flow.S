/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A small kernel whose every transfer of control is known: the oracle's self-test of
 * transfer.c. Booted by QEMU as PVH (-kernel), it goes to long mode, to an IDT and to
 * addresses as Linux has them, and to user mode (the same code, seen in the lower half). From
 * there it makes system calls and soft interrupts; the first system call has the flows.
 * At the end it prints "ready" on port 0xe9 and stops. The test names places by the labels.
 */
#define KBASE 0xffffffff80000000
#define IDT 0xfffffe0000000000
#define LAPIC 0xfee00000
#define UNMAPPED 0x100000000
#define EFER 0xc0000080
#define STAR 0xc0000081
#define LSTAR 0xc0000082
#define FMASK 0xc0000084
#define VECTOR_SOFT 0x40
#define VECTOR_IPI 0x50
#define KERNEL_CS 0x08
#define USER_DS 0x23
#define USER_CS 0x2b
#define TSS 0x30

	.macro	wrmsr64 msr, high, low
	mov	$\msr, %ecx
	mov	$\high, %edx
	mov	$\low, %eax
	wrmsr
	.endm

	.macro	set_gate vector, entry, flags	/* the IDT is at physical 0 */
	lea	\entry(%rip), %rax
	movabs	$(IDT + \vector * 16), %rdi
	mov	%ax, (%rdi)
	movw	$KERNEL_CS, 2(%rdi)
	movw	$\flags, 4(%rdi)
	shr	$16, %rax
	mov	%rax, 6(%rdi)
	.endm

	.section .note.Xen, "a", @note
	.long	4, 4, 18			/* XEN_ELFNOTE_PHYS32_ENTRY */
	.asciz	"Xen"
	.long	boot32 - KBASE

/* --- tables --- */

	.data
	.balign	4096
pml4:	.quad	pdpt_low - KBASE + 7
	.fill	507, 8, 0
	.quad	pdpt_low - KBASE + 7		/* IDT */
	.fill	2, 8, 0
	.quad	pdpt_high - KBASE + 7
pdpt_low:
	.quad	0x00000087, 0x40000087, 0x80000087, 0xc0000097	/* 1 GiB each; last: no cache */
	.fill	508, 8, 0
pdpt_high:
	.fill	510, 8, 0
	.quad	0x00000087, 0
gdt:	.quad	0, 0x00af9b000000ffff, 0x00cf93000000ffff	/* null, code, data */
	.quad	0, 0x00cff3000000ffff, 0x00affb000000ffff	/* unused, user data, user code */
gdt_tss:
	.quad	0x0000890000000067, 0
gdt_ptr32:
	.word	gdt_ptr32 - gdt - 1
	.long	gdt - KBASE
gdt_ptr:
	.word	gdt_ptr32 - gdt - 1
	.quad	gdt
idt_ptr:
	.word	4095
	.quad	IDT
tss:	.long	0
	.quad	stack			/* rsp0 */
	.fill	92, 1, 0
word:	.quad	0
	.balign	16
	.fill	4096, 1, 0
stack:

/* --- boot: nothing is recorded yet --- */

	.text
	.code32
boot32:
	cli
	lgdt	gdt_ptr32 - KBASE
	mov	$0x20, %eax			/* PAE */
	mov	%eax, %cr4
	mov	$(pml4 - KBASE), %eax
	mov	%eax, %cr3
	mov	$EFER, %ecx
	rdmsr
	or	$0x101, %eax			/* long mode, syscall */
	wrmsr
	mov	$0x80000011, %eax
	mov	%eax, %cr0
	ljmp	$KERNEL_CS, $(boot64 - KBASE)
	.code64
boot64:	movabs	$high, %rax
	jmp	*%rax
high:	lgdt	gdt_ptr(%rip)
	mov	$0x10, %eax
	mov	%eax, %ss
	mov	%eax, %ds
	mov	%eax, %es
	lea	stack(%rip), %rsp
	lea	tss(%rip), %rax
	mov	%ax, gdt_tss + 2(%rip)
	shr	$16, %rax
	mov	%al, gdt_tss + 4(%rip)
	mov	%ah, gdt_tss + 7(%rip)
	shr	$16, %rax
	mov	%eax, gdt_tss + 8(%rip)
	mov	$TSS, %eax
	ltr	%ax
	mov	$0xff, %al			/* no interrupts but ours */
	out	%al, $0x21
	out	%al, $0xa1
	mov	$LAPIC, %esi
	movl	$0x1ff, 0xf0(%rsi)		/* local APIC on */
	wrmsr64	STAR, 0x00180008, 0
	wrmsr64	FMASK, 0, 0x200
	lea	enter(%rip), %rax
	mov	$LSTAR, %ecx
	mov	$-1, %edx
	wrmsr
	mov	$0, %ebx
	movabs	$IDT, %rdi
gates:	lea	unexpected(%rip), %rax
	mov	%ax, (%rdi)
	movw	$KERNEL_CS, 2(%rdi)
	movw	$0x8e00, 4(%rdi)
	shr	$16, %rax
	mov	%rax, 6(%rdi)
	add	$16, %rdi
	inc	%ebx
	cmp	$256, %ebx
	jne	gates
	set_gate 6, invalid_entry, 0x8e00
	set_gate 14, fault_entry, 0x8e00
	set_gate VECTOR_SOFT, soft_entry, 0xee00
	set_gate VECTOR_IPI, ipi_entry, 0x8e00
	lidt	idt_ptr(%rip)
	push	$USER_DS
	push	$0
	push	$2
	push	$USER_CS
	push	$(user - KBASE)
first_iret:
	iretq

/* --- user mode, in the lower half --- */

user:	mov	$0, %eax
	syscall
	mov	$3, %ebx
user_loop:
	int	$VECTOR_SOFT
	dec	%ebx
	jnz	user_loop
	mov	$1, %eax
	syscall

/* --- the flows --- */

enter:	lea	stack - 256(%rip), %rsp
	push	%rcx
	push	%r11
	test	%eax, %eax
enter_jnz:
	jnz	finish
enter_done:
	mov	$100, %ecx
loop:	dec	%ecx
loop_jnz:
	jnz	loop
loop_done:
	mov	$7, %ebx
calls:
call:	call	callee
call_back:
	dec	%ebx
calls_jnz:
	jnz	calls
calls_done:
	mov	$5, %ebx
ways:	lea	even(%rip), %rax
	lea	odd(%rip), %rdx
	test	$1, %ebx
	cmovnz	%rdx, %rax
way_jmp:
	jmp	*%rax
odd:	nop
odd_jmp:
	jmp	way_end
even:	nop					/* runs into way_end: no transfer */
way_end:
	dec	%ebx
ways_jnz:
	jnz	ways
ways_done:
	lea	pml4(%rip), %rsi
	mov	$100000, %ecx			/* QEMU leaves its loop every 65536 */
rep:	rep	lodsb
rep_done:
	movabs	$UNMAPPED, %rdi
	nop
fixed_load:					/* in the middle of a block */
	mov	(%rdi), %rax
	nop
fixed_jmp:
	jmp	unexpected
fixed_up:
	nop
again_load:					/* restarted, with another rdi */
	mov	(%rdi), %rax
	nop
invalid:
	ud2
invalid_done:
	mov	$LAPIC, %esi
device:						/* in the middle of a block */
	movl	$0x1ff, 0xf0(%rsi)
device_done:
	nop
sti:	sti
sti_done:
	nop
ipi:	movl	$(0x40000 + VECTOR_IPI), 0x300(%rsi)	/* to itself */
ipi_done:
	nop
	cli
cross_jmp:
	jmp	cross
leave:	pop	%r11
	pop	%rcx
sysret:	sysretq

callee:	nop
callee_ret:
	ret

/* --- gates --- */

soft_entry:
	nop
soft_iret:
	iretq

ipi_entry:
	nop
ipi_device:
	movl	$0, 0xb0(%rsi)			/* end of interrupt */
ipi_device_done:
	nop
ipi_iret:
	iretq

invalid_entry:
	addq	$2, (%rsp)
invalid_iret:
	iretq

fault_entry:
	add	$8, %rsp
	lea	fixed_load(%rip), %rax
	cmp	%rax, (%rsp)
fault_jne:
	jne	fault_again
fault_fix:
	lea	fixed_up(%rip), %rax
	mov	%rax, (%rsp)
fixed_iret:
	iretq
fault_again:
	lea	word(%rip), %rdi
again_iret:
	iretq

/* --- a block that goes over the end of a page --- */

	.balign	4096
	.skip	4096 - 8, 0x90
cross:	.skip	7, 0x90
cross_last:
	nop
cross_page:
	nop
cross_back:
	jmp	leave

/* --- the end: not compared --- */

unexpected:
	mov	$'!', %al
	out	%al, $0xe9
finish:	lea	ready(%rip), %rsi
	mov	$(ready_end - ready), %ecx
	mov	$0xe9, %edx
	cld
	rep	outsb
	cli
	hlt
ready:	.ascii	"ready\n"
ready_end:
